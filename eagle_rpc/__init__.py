"""EAGLE-3 drafts trained against a target that runs as a torch.distributed.rpc service."""

__version__ = "0.1.0"
