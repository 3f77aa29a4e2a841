"""What follows from tensors, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


def fingerprint(x: Any) -> Any:
    """Equal as long as a tensor is the same and unchanged; anything else stands for itself."""
    if not isinstance(x, Tensor):
        return x
    return id(x), x.data_ptr(), 0 if x.is_inference() else x._version


class Kept(Generic[T]):
    """The last value made, with what it was made of; copies and pickles start empty."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._value: T | None = None
        self._held: tuple[Any, ...] = ()

    def get(self, make: Callable[[], T], parts: tuple[Any, ...]) -> T:
        """The value, made anew if any of the parts is another one or has changed."""
        key = tuple(map(fingerprint, parts))
        if self._value is None or key != self._key:
            self._value = make()
            self._key = key
            self._held = parts  # so that no other tensor takes over their ids
        return self._value

    def __deepcopy__(self, memo: Any) -> Kept[T]:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return Kept, ()
