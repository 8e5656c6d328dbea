"""Sites of a model, and capture of what passes there, with plain torch hooks.

Letters: B segments of a batch, T positions, D width of a site.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared.config import unknown
from shared.errors import ActivationError, SiteError

Side = Literal["in", "out"]
Run = Callable[..., dict[str, Tensor]]

KINDS = ("resid", "resid_in", "mlp_in", "mlp_out", "attn_out", "heads")
ATTENTION = ("self_attn", "attn", "attention")
MLP = ("mlp",)
PROJECTION = ("o_proj", "c_proj", "out_proj", "dense")  # of what the heads give, concatenated
HOOK_NAMES = {  # of TransformerLens, where rows of the same values pass
    "resid": "hook_resid_post", "resid_in": "hook_resid_pre", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out",
    "heads": "attn.hook_z",
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A module and the side on which its rows are read."""

    name: str
    module: str
    side: Side


class _Stop(Exception):  # noqa: N818 (not an error: it ends a forward pass whose rest nobody needs)
    """Raised by the last hook."""


def find(model: nn.Module, name: str) -> Site:
    """The site called `name`: KIND.N for block N, or a dotted module path with `:in` or `:out` (the default).

    Raises SiteError, naming the nearest sites, where the model has none of this name.
    """
    if match := re.fullmatch(r"([a-z_]+)\.(\d+)", name):
        kind, block = match[1], int(match[2])
        if kind in KINDS:
            named = _named(model)
            if block not in range(len(blocks(model)[1])):
                way_out = f"Its {len(blocks(model)[1])} blocks are {kind}.0 to {kind}.{len(blocks(model)[1]) - 1}"
                raise SiteError("the model has no site", name, way_out)
            if name in named:
                return named[name]
    path, _, side = name.partition(":")
    modules = dict(model.named_modules())
    path = _local(model, path)
    if path in modules and path and side in ("", "in", "out"):
        return Site(name, path, "in" if side == "in" else "out")
    candidates = [*_named(model), *(f"{module}:out" for module in modules if module)]
    error = unknown("the model has no site", name, candidates)
    raise SiteError("the model has no site", name, error.way_out)


def _local(model: nn.Module, path: str) -> str:
    """A module path as the model with its language-model head has it, seen from the model without: model.layers.3."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return path.removeprefix(prefix) if path.startswith(prefix) and path not in dict(model.named_modules()) else path


def expand(model: nn.Module, pattern: str) -> list[str]:
    """The sites that a pattern names, in the model's order: `resid.{4,8}`, `resid.*`, `layers.*.mlp:out`.

    `*` stands for anything without a dot. Raises SiteError where nothing matches.
    """
    found = []
    for one in _braces(pattern):
        path, _, side = one.partition(":")
        path = _local(model, path)
        if "*" not in one:
            found.append(path + (f":{side}" if side else ""))
            continue
        names = [*_named(model), *(name for name, _ in model.named_modules() if name)]
        matches = re.compile(re.escape(path).replace(r"\*", r"[^.]*"))
        hits = [name + (f":{side}" if side else "") for name in names if matches.fullmatch(name)]
        if not hits:
            raise SiteError("the model has no site like this", one, "See harvest sites MODEL")
        found += hits
    return list(dict.fromkeys(found))


def _braces(pattern: str) -> list[str]:
    """`a.{1,2}` -> a.1, a.2."""
    if not (match := re.search(r"\{([^{}]*)\}", pattern)):
        return [pattern]
    return [
        one for item in match[1].split(",") for one in _braces(pattern[: match.start()] + item + pattern[match.end() :])
    ]


def heads(model: nn.Module, site: str) -> int | None:
    """How many heads of one size stand side by side in the rows of a site heads.N; None for other sites."""
    if not re.fullmatch(r"heads\.\d+", site):
        return None
    config: Any = model.config
    return int(getattr(config, "get_text_config", lambda: config)().num_attention_heads)


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path of the model's blocks and the blocks. Raises SiteError where there is no such list."""
    config: Any = model.config
    config = getattr(config, "get_text_config", lambda: config)()  # of a model of several modalities
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    }
    found = {
        path: module for path, module in found.items() if "language_model" in path
    } or found  # not the vision tower
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        value = f"{type(model).__name__} ({' or '.join(outer) or 'none'})"
        raise SiteError("cannot find the model's blocks", value, "Name sites by their module path instead")
    return outer[0], found[outer[0]]


def _named(model: nn.Module) -> dict[str, Site]:
    """Every site of the form KIND.N."""
    root, layers = blocks(model)
    sites = {}
    for number, block in enumerate(layers):
        path = f"{root}.{number}"
        found: dict[str, tuple[str, Side]] = {"resid": (path, "out"), "resid_in": (path, "in")}
        found |= _inside(block, path)
        for kind, (module, side) in found.items():
            sites[f"{kind}.{number}"] = Site(f"{kind}.{number}", module, side)
    return sites


def _inside(block: nn.Module, path: str) -> dict[str, tuple[str, Side]]:
    """Where a block's attention and MLP are read. In BERT both end in a Dense layer before the sum and the norm."""
    children = dict(block.named_children())
    found: dict[str, tuple[str, Side]] = {}
    attention = next((name for name in ATTENTION if name in children), None)
    mlp = next((name for name in MLP if name in children), None)
    inside = dict(children[attention].named_children()) if attention else {}
    if "output" in inside:
        found["attn_out"] = (f"{path}.{attention}.output.dense", "out")
        found["heads"] = (f"{path}.{attention}.output.dense", "in")
    elif attention:
        found["attn_out"] = (f"{path}.{attention}", "out")
        if projection := next((name for name in PROJECTION if name in inside), None):
            found["heads"] = (f"{path}.{attention}.{projection}", "in")
    if mlp:
        found |= {"mlp_in": (f"{path}.{mlp}", "in"), "mlp_out": (f"{path}.{mlp}", "out")}
    elif "intermediate" in children and "output" in children:
        found |= {"mlp_in": (f"{path}.intermediate", "in"), "mlp_out": (f"{path}.output.dense", "out")}
    return found


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site]) -> Iterator[Run]:
    """A function that runs the model on its keyword arguments and returns {site name: Tensor [B, T, D]}.

    The forward pass ends behind the last site: later blocks are not run. The values are not cast; all but the last are
    copies, since some models go on to add to them in place (Falcon to its mlp_out). The hooks are gone when the block
    ends.
    """
    caught: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            module = model.get_submodule(site.module)
            if site.side == "in":
                handle = module.register_forward_pre_hook(_reader(site, caught, len(sites)), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_writer(site, caught, len(sites)))
            stack.callback(handle.remove)

        def run(**inputs: Any) -> dict[str, Tensor]:
            caught.clear()
            with suppress(_Stop):
                model(**inputs, use_cache=False)
            if missing := [site.name for site in sites if site.name not in caught]:
                raise SiteError(
                    "these sites were not reached by a forward pass", ", ".join(missing), "Name other sites"
                )
            shape = inputs["input_ids"].shape
            return {site.name: _checked(site, caught[site.name], shape) for site in sites}

        yield run


@contextmanager
def splice(model: nn.Module, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside of the block, what passes at a site is what `change` makes of it. Whatever else a module takes or gives
    stays as it is."""
    module = model.get_submodule(site.module)

    def taking(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(unwrap(args[0], site.name)), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(unwrap(kwargs.get("hidden_states"), site.name))}

    def giving(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = change(unwrap(output, site.name))
        if isinstance(output, Mapping):  # transformers' ModelOutput
            return type(output)(**{**output, "last_hidden_state": changed})
        if isinstance(output, tuple) and getattr(output, "_fields", None):  # a namedtuple
            return type(output)(changed, *output[1:])
        if isinstance(output, tuple | list):
            return type(output)([changed, *output[1:]])
        return changed

    if site.side == "in":
        handle = module.register_forward_pre_hook(taking, with_kwargs=True)
    else:
        handle = module.register_forward_hook(giving)
    try:
        yield
    finally:
        handle.remove()


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The path of a module in a model. Raises SiteError where it is none of its."""
    for path, one in model.named_modules():
        if one is module:
            return path
    raise SiteError("this module is none of the model's", type(module).__name__, "Give one of model.named_modules()")


def _reader(site: Site, caught: dict[str, Tensor], wanted: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _catch(site, args[0] if args else kwargs.get("hidden_states"), caught, wanted)

    return hook


def _writer(site: Site, caught: dict[str, Tensor], wanted: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _catch(site, output, caught, wanted)

    return hook


def _catch(site: Site, value: Any, caught: dict[str, Tensor], wanted: int) -> None:
    caught[site.name] = unwrap(value, site.name)
    if len(caught) == wanted:
        raise _Stop
    caught[site.name] = caught[site.name].clone()


def unwrap(output: Any, name: str) -> Tensor:
    """The hidden states in what a module takes or gives: a Tensor, the first of a tuple, or `last_hidden_state`."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    output = getattr(output, "last_hidden_state", output)
    if not isinstance(output, Tensor):
        raise ActivationError(f"{name} carries no tensor of activations", type(output).__name__, "Name another site")
    return output


def _checked(site: Site, value: Tensor, shape: torch.Size) -> Tensor:
    if value.ndim == 2 and value.shape[0] == shape.numel():  # some modules see all positions in one axis
        value = value.view(*shape, -1)
    if value.ndim != 3 or value.shape[:2] != shape:
        expected = f"{tuple(value.shape)}, expected {tuple(shape)} and a width"
        raise ActivationError(f"{site.name} has no row per position", expected, "Name another site")
    return value


def widths(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """{site: width}, from a forward pass over two positions. A model on the meta device costs nothing."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    mask = torch.zeros(1, 1, 2, 2, device=device)  # additive: transformers takes it as it is and looks at no value
    sites = [find(model, name) for name in names]
    with torch.inference_mode(), capture(model, sites) as run:
        return {name: value.shape[-1] for name, value in run(input_ids=ids, attention_mask=mask).items()}


def list_sites(model: nn.Module) -> dict[str, int]:
    """Every KIND.N site and its width, in the model's order."""
    return widths(model, list(_named(model)))


def self_check(model: nn.Module, sites: Sequence[str], ids_BT: Tensor, mask_BT: Tensor) -> None:
    """Refuse to go on where a hooked block output is not what the model itself returns as hidden state.

    `output_hidden_states` gives the input of block 0 and the output of every block, but the last one behind the final
    norm, so the last block is not compared. Values that are not finite must be so in both. Raises ActivationError.
    """
    number = len(blocks(model)[1])
    checked = [name for name in sites if re.fullmatch(r"resid\.\d+", name) and int(name.split(".")[1]) < number - 1]
    if not checked:
        return
    with torch.inference_mode():
        with capture(model, [find(model, name) for name in checked]) as run:
            caught = run(input_ids=ids_BT, attention_mask=mask_BT)
        states = model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
    for name, value in caught.items():
        real = mask_BT.bool()
        hooked_ND, own_ND = value[real], states[int(name.split(".")[1]) + 1][real]
        size = float(_finite(own_ND).abs().max())
        if not torch.allclose(hooked_ND, own_ND, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
            worst = float(_finite(hooked_ND - own_ND).abs().max())
            raise ActivationError(
                f"{name} is not the model's own hidden state", f"largest difference {worst:.3g}",
                "This version of transformers is not supported for this model; please report it",
            )  # fmt: skip


def _finite(x_ND: Tensor) -> Tensor:
    return x_ND.nan_to_num(0.0, 0.0, 0.0)


def hook_name(site: str) -> str | None:
    """The hook point of TransformerLens at which the rows of a site pass; none where there is none."""
    kind, _, block = site.partition(".")
    return f"blocks.{block}.{HOOK_NAMES[kind]}" if kind in HOOK_NAMES and block.isdigit() else None


def of_hook_name(name: str) -> str | None:
    """The site at which the rows of a hook point of TransformerLens pass; none where there is none."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    kinds = {point: kind for kind, point in HOOK_NAMES.items()}
    return f"{kinds[found[2]]}.{found[1]}" if found and found[2] in kinds else None
