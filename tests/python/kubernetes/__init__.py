"""What `k8s` describes, as processes of this machine: see `check_kubernetes.py`."""
