"""The Sluice protocol, a second time: written from docs/protocol.md, sharing no code with the project."""


class Refused(Exception):
    """Something is not acceptable; `code` is the name that the protocol gives to the reason."""

    def __init__(self, code, detail=""):
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail
