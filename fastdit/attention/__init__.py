"""What attention runs in: the backends, `auto`'s choice among them, and the measurements that it chooses by.

`fastdit.ops.attention` is attention itself. Each backend has a file of its own; `choice` says how one is chosen,
`registry` where measurements are kept. `measure(fastdit.ops.attention, cases, device=...)` takes them and `save` keeps
them for this user.
"""

from .backends import BACKENDS, CALLABLE, CHOICES
from .choice import STATIC_ORDER, choose, describe, forget
from .limits import Like
from .measuring import Case, Row, measure, save
from .registry import DIRECTIONS

__all__ = [
    "BACKENDS",
    "CALLABLE",
    "CHOICES",
    "DIRECTIONS",
    "STATIC_ORDER",
    "Case",
    "Like",
    "Row",
    "choose",
    "describe",
    "forget",
    "measure",
    "save",
]
