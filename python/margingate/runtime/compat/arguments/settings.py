"""SGLang's server arguments by what they were resolved to: nothing else reads or writes them.

ServerArgs keeps what was given; what SGLang decides is declared beside it, and what is in effect
in a process that runs a model is a third copy, made when the arguments are published there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


def view(server_args: Any) -> Any:
    """The arguments with all decisions made so far, which later ones show in too; read only.

    Before they are resolved, this is what was given.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def is_resolved(server_args: Any) -> bool:
    """Whether SGLang has decided everything; nothing can be set any more."""
    return bool(getattr(server_args, "_resolution_finished", False))


def choose(server_args: Any, **fields: Any) -> None:
    """Set fields as if they had been given; only before the arguments are resolved."""
    for name, value in fields.items():
        setattr(server_args, name, value)


def attention_backends(server_args: Any) -> tuple[str | None, str | None]:
    """Names of the backends of prefill and of decode."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    prefill, decode = attention_backends_of(view(server_args))
    return prefill, decode


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of the model that is named, made once."""
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(server_args)


@contextmanager
def overridden(**fields: Any) -> Iterator[None]:
    """Meanwhile these values are in effect in this process, where the arguments are published.

    Raises:
        ValueError: a field is none of ServerArgs, or nothing is published here.
    """
    from sglang.srt.arg_groups.arg_utils import namespace_of
    from sglang.srt.runtime_context import get_context

    context = get_context()
    places = namespace_of(type(context.server_args))
    with ExitStack() as stack:
        for name, value in fields.items():
            if name not in places:
                raise ValueError(f"{name} is no field of SGLang's server arguments")
            top, *below = places[name].split(".")
            bag = context.config_bag(top)
            for part in below:
                bag = getattr(bag, part)
            stack.enter_context(bag.override(**{name: value}))
        yield


def in_effect(name: str) -> Any:
    """The value of a field that is in effect in this process, `overridden` included."""
    from sglang.srt.runtime_context import get_context

    return get_context().config_leaf(name)
