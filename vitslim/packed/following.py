"""A module that stands for another one and follows it: its source."""

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VitslimError
from ..wrapped import copy_of
from .packable import ENCODED, check_encoded, check_heads, check_tensors, check_whole
from .twins import Twins, skeleton
from .watch import EncoderWatch, HeadWatch

ARRAYS = ("start", "vectors", "panels", "layout")
FORGOTTEN = "this model was packed with keep_source=False, which forgets the weights"
# Methods of timm that run single blocks, which a model without its source has not.
_OF_BLOCKS = ("forward_intermediates", "get_intermediate_layers")
_HARMLESS = (type(None), bool, int, float, str, tuple)
# Made again from the rest, or of no use elsewhere.
_DERIVED = (
    "_lock",
    "_facts",
    "_encoder_watch",
    "_head_watch",
    "_twins",
    "_made",
    "_compiled_call_impl",
)


class Following(nn.Module):
    """What it has not itself is its source's; what is put into it goes there.

    Modules that are not encoded are the source's head: they are here as twins in eval mode, with
    the source's tensors and hooks. Before a call, or when somebody asks for the source, what was
    put into the twins is put into the source; then, what has changed in the source is made again
    here. What took another's place in a twin works at once and is the source's as soon as that is
    asked for.

    Args:
        model: The source.
        keep_source: Keep the model itself, and not its skeleton: the encoder's parameters on
            "meta", and a head of its own.
    """

    def __init__(self, model: nn.Module, keep_source: bool) -> None:
        super().__init__()
        self._keep_source, self._lock = keep_source, threading.RLock()
        self._non_persistent_buffers_set = set(ARRAYS)
        # Nobody can change a skeleton, or the head beside it, before somebody got hold of it.
        self._reached = self._head_reached = keep_source
        self._take(model)
        nn.Module.train(self, False)

    def _make_arrays(self, model: nn.Module) -> dict[str, Tensor]:
        """Makes the buffers, by name, of a model that can be packed."""
        raise NotImplementedError

    def _make_facts(self, model: nn.Module) -> None:
        """Notes what a call has to know of a model, after any change of it."""
        raise NotImplementedError

    def _take(self, model: Any) -> None:
        """Makes all anew for a model, which or whose skeleton is the source from now on."""
        check_whole(model)
        check_tensors(model)
        # Looked at first, so that what another thread changes meanwhile is seen at the next call.
        watch = EncoderWatch(model)
        check_encoded(model)
        check_heads(model)
        # What is made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            arrays = self._make_arrays(model)
            source = model if self._keep_source else skeleton(model)
        # Not as a submodule: neither `parameters` nor torch.export shall see it.
        self.__dict__["_source"] = source
        self._buffers = arrays
        self._take_head()
        self._encoder_watch = watch if self._keep_source else EncoderWatch(source)

    def _take_head(self) -> None:
        """Makes anew what does not depend on the encoder."""
        check_whole(self._source)
        check_heads(self._source)
        watch, twins = HeadWatch(self._source), Twins()
        children = self._source._modules.items()
        with torch.inference_mode(False), torch.no_grad():
            head = {name: twins.of(child) for name, child in children if name not in ENCODED}
        watch.add(twins.modules(), twins.parameters())
        self._make_facts(self._source)
        # Each in one step, for a thread that is just taking them.
        self._modules = head
        self._twins, self._made, self._head_watch = twins, dict(head), watch

    def _follow(self) -> None:
        """Makes again what has changed. A compiled graph holds what was there before."""
        if torch.compiler.is_compiling():
            return
        encoder = self._reached and self._encoder_watch.changed()
        if not encoder and not (self._head_reached and self._head_watch.changed()):
            return
        with self._lock:
            self._write_back()
            if self._reached and self._encoder_watch.changed():
                self._encoder_changed()
            elif self._head_watch.changed():
                self._take_head()

    def _encoder_changed(self) -> None:
        if self._keep_source:
            self._take(self._source)
            return
        check_whole(self._source)
        check_encoded(self._source)  # which names the part if it is not as it has to be
        raise VitslimError(
            f"{FORGOTTEN}, so that a change of the parts before the head cannot be followed; "
            "change the model, and pack it again"
        )

    def _write_back(self) -> None:
        """Puts what was put into the head here into the source."""
        with self._lock:
            now, made = self._modules, self._made
            for name in [name for name in {**made, **now} if now.get(name) is not made.get(name)]:
                if name in now:
                    setattr(self._source, name, self._twins.untwinned(now[name]))
                else:
                    delattr(self._source, name)
            self._made = dict(now)
            self._twins.write_back()

    @property
    def source(self) -> Any:
        """The model that this one stands for; with keep_source=False its skeleton."""
        self._reached = self._head_reached = True
        self._write_back()
        return self._source

    def repack(self) -> None:
        """Makes all anew; a call does so by itself where it notices a change."""
        if not self._keep_source:
            raise VitslimError(f"{FORGOTTEN}; use load_state_dict, or pack a model again")
        with self._lock:
            self._take(self.source)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if name in own.get("_buffers", ()):
            return own["_buffers"][name]
        source: Any = own.get("_source")
        if name in own.get("_modules", ()):
            here = own["_modules"][name]
            # Until the next call the source may have another one.
            if torch.compiler.is_compiling():
                return here
            own["_head_reached"] = True
            if here is not own["_made"].get(name):
                return here
            there = source._modules.get(name)
            return here if own["_twins"].stands_for(here, there) else there
        if source is None or not hasattr(source, name):
            return super().__getattr__(name)  # which raises
        if name in _OF_BLOCKS:
            if not self._keep_source:
                raise VitslimError(f"{FORGOTTEN}; {name} needs them")
            return getattr(Twins().of(self.source), name)
        value = getattr(source, name)
        if not isinstance(value, _HARMLESS):
            self._reached = self._head_reached = True
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("source", *ARRAYS):
            raise VitslimError(
                f"{name} of a packed model cannot be set: change its source, or pack another model"
            )
        if name.startswith("_") or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
            return
        with self._lock:
            setattr(self.source, name, self._twins.untwinned(value))

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
            return
        with self._lock:
            delattr(self.source, name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Registers a buffer of the source."""
        self.source.register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter of the source."""
        self.source.register_parameter(name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a module to the source."""
        self.source.add_module(name, module)

    def apply(self, fn: Callable[[nn.Module], None]) -> "Following":
        """Applies a function to all modules of the source."""
        if not self._keep_source:
            raise VitslimError(f"{FORGOTTEN}; a function cannot be applied to the parts")
        self.source.apply(fn)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the source; here there are none."""
        self.source.zero_grad(set_to_none)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the source's state dict."""
        if not self._keep_source:
            raise VitslimError(f"{FORGOTTEN}; save the model before it is packed")
        return self.source.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads the source's state dict, and packs it. Arguments and result are torch's."""
        with self._lock:
            if self._keep_source:
                result = self.source.load_state_dict(state_dict, strict, assign)
                self._take(self._source)
                return result
            # A skeleton takes tensors only as its own, in the precision of the packed model.
            own = {
                name: value.detach().to("cpu", torch.float32, copy=True)
                if value.is_floating_point()
                else value
                for name, value in state_dict.items()
            }
            self._write_back()
            model = copy_of(self._source)
            result = model.load_state_dict(own, strict, assign=True)
            missing = [name for name, each in model.named_parameters() if each.is_meta]
            if missing:
                raise VitslimError(f"{FORGOTTEN}; a state dict without {missing[0]} is not enough")
            self._take(model)
            return result

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads a packed model that is part of another model."""
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            missing, unexpected = self.load_state_dict(own, False, assign)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [prefix + name for name in unexpected]

    def __getstate__(self) -> dict[str, Any]:
        self._write_back()
        state = {name: value for name, value in vars(self).items() if name not in _DERIVED}
        state["_modules"] = {}
        if self._keep_source:
            state["_buffers"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())
        if self._keep_source:
            self._take(self._source)
        else:
            self._take_head()
            self._encoder_watch = EncoderWatch(self._source)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Following":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = self.__getstate__()
        # Not deepcopy's way, which refuses what a hook has kept of a graph.
        memo.setdefault(id(self._source), copy_of(self._source))
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin
