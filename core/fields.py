"""What an argument of a configuration may be: one description checks it, documents it and gives its JSON schema.

A field is declared once, in a dataclass; the error for a bad value names the field, what was expected and what came.
"""
from __future__ import annotations

import dataclasses
import difflib
from enum import Enum
from typing import Any, Dict, List, Optional, Sequence, Type

from slimtrain.core.schedule import EPOCHS, Moment, check_moment

_SPEC = "spec"


class Spec:
    """A kind of value.

    Args:
        doc: what the field means, one sentence.
        optional: None is allowed, too.
    """

    def __init__(self, doc: str, optional: bool = False) -> None:
        self.doc = doc
        self.optional = optional

    def check(self, value: Any) -> Any:
        """The value in its one form.

        Raises:
            TypeError: the value is of another kind; the message says what was expected.
            ValueError: it is of this kind, and out of range.
        """
        raise NotImplementedError

    def schema(self) -> Dict[str, Any]:
        """The JSON schema of the value, without its description."""
        raise NotImplementedError


class Integer(Spec):
    """An integer from ``low`` to ``high``, both included; None for no bound above."""

    def __init__(self, low: int, high: Optional[int], doc: str, optional: bool = False) -> None:
        super().__init__(doc, optional)
        self.low, self.high = low, high

    def check(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError("must be an integer %s, got %r" % (self._range(), value))
        if value < self.low or (self.high is not None and value > self.high):
            raise ValueError("must be an integer %s, got %r" % (self._range(), value))
        return value

    def _range(self) -> str:
        return "of at least %d" % self.low if self.high is None else "from %d to %d" % (self.low, self.high)

    def schema(self) -> Dict[str, Any]:
        bounds = {"minimum": self.low} if self.high is None else {"minimum": self.low, "maximum": self.high}
        return {"type": "integer", **bounds}


class Number(Spec):
    """A number from ``low`` to ``high``, both included."""

    def __init__(self, low: float, high: float, doc: str, optional: bool = False) -> None:
        super().__init__(doc, optional)
        self.low, self.high = low, high

    def check(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError("must be a number from %g to %g, got %r" % (self.low, self.high, value))
        if not self.low <= value <= self.high:
            raise ValueError("must be a number from %g to %g, got %r" % (self.low, self.high, value))
        return float(value)

    def schema(self) -> Dict[str, Any]:
        return {"type": "number", "minimum": self.low, "maximum": self.high}


class Fraction(Spec):
    """A number from 0 to 1; ``zero`` and ``one`` say whether the ends are included."""

    def __init__(self, doc: str, zero: bool = True, one: bool = True) -> None:
        super().__init__(doc)
        self.zero, self.one = zero, one

    def check(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError("must be a number in %s, got %r" % (self._range(), value))
        inside = 0.0 < value < 1.0 or (self.zero and value == 0.0) or (self.one and value == 1.0)
        if not inside:
            raise ValueError("must be a number in %s, got %r" % (self._range(), value))
        return float(value)

    def _range(self) -> str:
        return "%s0, 1%s" % ("[" if self.zero else "(", "]" if self.one else ")")

    def schema(self) -> Dict[str, Any]:
        return {"type": "number", "minimum" if self.zero else "exclusiveMinimum": 0,
                "maximum" if self.one else "exclusiveMaximum": 1}


class Flag(Spec):
    """True or false."""

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError("must be true or false, got %r" % (value,))
        return value

    def schema(self) -> Dict[str, Any]:
        return {"type": "boolean"}


class Text(Spec):
    """A string."""

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError("must be a text, got %r" % (value,))
        return value

    def schema(self) -> Dict[str, Any]:
        return {"type": "string"}


class Names(Spec):
    """Names or patterns of layers: a list of strings."""

    def check(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, (list, tuple)) or not all(
                isinstance(name, str) for name in value):
            raise TypeError("must be a list of layer names or patterns, got %r" % (value,))
        return tuple(value)

    def schema(self) -> Dict[str, Any]:
        # one string holds names joined by "+", as in the one-line form
        return {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}


class LayerBits(Spec):
    """Bits by layer name or pattern; a later entry that matches holds."""

    def check(self, value: Any) -> Dict[str, int]:
        if not isinstance(value, dict):
            raise TypeError("must be 'layer name or pattern: bits' entries, got %r" % (value,))
        for name, bits in value.items():
            if not isinstance(name, str) or isinstance(bits, bool) or not isinstance(bits, int):
                raise TypeError("must be 'layer name or pattern: bits' entries, got %r: %r" % (name, bits))
            if not 2 <= bits <= 8:
                raise ValueError("must hold bits from 2 to 8, got %r: %r" % (name, bits))
        return dict(value)

    def schema(self) -> Dict[str, Any]:
        return {"type": "object", "additionalProperties": {"type": "integer", "minimum": 2, "maximum": 8}}


class When(Spec):
    """A moment of training."""

    def check(self, value: Any) -> Moment:
        check_moment(value)
        return value

    def schema(self) -> Dict[str, Any]:
        return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0, "maximum": 1},
                          {"type": "string", "pattern": EPOCHS.pattern}]}


class Choice(Spec):
    """A member of an enumeration, written as its value."""

    def __init__(self, kind: Type[Enum], doc: str) -> None:
        super().__init__(doc)
        self.kind = kind

    def check(self, value: Any) -> Enum:
        if isinstance(value, self.kind):
            return value
        known = [member.value for member in self.kind]
        if value not in known:
            raise ValueError("must be one of %s, got %r" % (", ".join(known), value))
        return self.kind(value)

    def schema(self) -> Dict[str, Any]:
        return {"enum": [member.value for member in self.kind]}


def declare(default: Any, spec: Spec) -> Any:
    """A dataclass field of this kind."""
    return dataclasses.field(default=default, metadata={_SPEC: spec})


def require(spec: Spec) -> Any:
    """A dataclass field of this kind that must be given."""
    return dataclasses.field(metadata={_SPEC: spec})


def spec_of(field: dataclasses.Field[Any]) -> Spec:
    """The description of a declared field."""
    spec: Spec = field.metadata[_SPEC]
    return spec


def check_fields(instance: Any) -> None:
    """Check all declared fields of a frozen dataclass, and bring their values into their one form.

    Raises:
        TypeError, ValueError: the message begins with the name of the field.
    """
    for field in dataclasses.fields(instance):
        spec, value = spec_of(field), getattr(instance, field.name)
        if value is None and spec.optional:
            continue
        try:
            checked = spec.check(value)
        except (TypeError, ValueError) as error:
            raise type(error)("%s %s" % (field.name, error)) from None
        object.__setattr__(instance, field.name, checked)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    near: List[str] = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return "did you mean %s?" % near[0] if near else "known are %s" % ", ".join(known)
