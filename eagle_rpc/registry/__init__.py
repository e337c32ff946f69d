"""The directory where elastic workers find each other: a small process without torch.

`beat` keeps a worker announced; `client` and `server` speak the protocol of `wire`; `directory` decides who
is let in; `record` is the entry of a worker; `ids` numbers workers; `token` is the shared secret.
"""

from eagle_rpc.registry.beat import Beat, register, take_id
from eagle_rpc.registry.client import RegistryClient
from eagle_rpc.registry.directory import Directory
from eagle_rpc.registry.ids import LAST_WORKER_ID, IdFile
from eagle_rpc.registry.record import Record
from eagle_rpc.registry.server import RegistryServer
from eagle_rpc.registry.token import load_or_create_token, load_token

__all__ = [
    "LAST_WORKER_ID",
    "Beat",
    "Directory",
    "IdFile",
    "Record",
    "RegistryClient",
    "RegistryServer",
    "load_or_create_token",
    "load_token",
    "register",
    "take_id",
]
