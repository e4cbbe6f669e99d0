"""Is a model what it was?"""

from torch import nn


def fingerprint(model: nn.Module) -> dict:
    """Everything attaching could change, per module: class, `__dict__` keys, every hook, `forward`, config, weights."""
    prints: dict = {"config": repr(getattr(model, "config", None)), "training": model.training}
    for name, module in model.named_modules():
        hooks = {
            key: [(number, id(hook)) for number, hook in value.items()]
            for key, value in vars(module).items()
            if "hook" in key and isinstance(value, dict)
        }
        prints[name] = {
            "class": (type(module), type(module).__call__, type(module).forward),
            "keys": sorted(vars(module)),
            "forward": module.forward.__func__,
            "hooks": hooks,
        }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        prints[f"{name} (tensor)"] = (tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.dtype)
    return prints


def changed(before: dict, after: dict) -> list[str]:
    """What differs between two fingerprints, as text."""
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
