"""Root filesystems of images. Sluice's is the very one that is packed; of others the programs are this machine's."""

import pathlib
import re
import shutil
import typing

from .pod import run


class Image(typing.NamedTuple):
    root: pathlib.Path
    entrypoint: list
    environment: dict


def make_places(root, places):
    """A container engine makes these."""
    for place in places:
        (root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)


def of_sluice(script, root, binary, manifests):
    run(script, root, binary)
    make_places(root, manifests.mounts("sluice"))
    return Image(root, ["/usr/local/bin/sluice"], {})


def of_redis(root, manifests):
    """Debian's server and client with their libraries, where the image has its own."""
    for name in ("redis-server", "redis-cli"):
        program = shutil.which(name)
        assert program, f"{name} is missing: apt install redis-server"
        place = root / "usr/local/bin" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(program, place)
        for library in re.findall(r"/\S+", run("ldd", program).stdout):
            place = root / library.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)
    make_places(root, ["etc", "proc", *manifests.mounts("redis")])
    (root / "etc/hosts").touch()
    return Image(root, [], {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
