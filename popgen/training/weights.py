"""Where the weights of a model come from: other runs, the data, or a checkpoint of its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from popgen.errors import ArgumentError, CheckpointError, check_choice
from popgen.streams import make_generator
from popgen.training.run_directory import find_run
from popgen.training.state import AnyModule, check_same_tensors, copy_by_name, model_with_weights, tensors_of

WEIGHTS = ("raw", "averaged")


def initialise(model: nn.Module, pretrained: Mapping[str, str], examples: Any, seed: int) -> None:
    """Gives a model its pretrained parts, and the others that ask for it their first values from the data, in place.

    Args:
        model: parts of it that have a method `initialise_from_data(images, generator)` are given the training images.
        pretrained: name of a part, or "" for the whole model, to the run whose best checkpoint holds its weights; see
            `find_run`.
        examples: the training split; where a part is initialised from the data, images of shape `(count, size)`: uint8
            levels, or floating point as the model is given it.
        seed: of the generators that the parts draw with.

    Raises:
        ArgumentError: if the model has no such part, or the data is too small for it.
        CheckpointError: if there is no such run, or it is of another model.

    Example: `state_to_start_from` calls it.
    """
    given: set[nn.Module] = set()
    parts: dict[str, nn.Module] = {"": model, **dict(model.named_children())}
    for name, run_name in pretrained.items():
        if name not in parts:
            raise ArgumentError(
                f"Experiment.pretrained: {type(model).__name__} has no part {name!r}; it has "
                f"{', '.join(filter(None, parts))}, and '' is the whole of it"
            )
        tensors = find_run(f"Experiment.pretrained[{name!r}]", run_name).load_checkpoint("best")
        print(f"pretrained: {name or 'the model'} is that of {run_name!r} at step {tensors['step']}", flush=True)
        weights = {**tensors["parameters"], **tensors["buffers"]}
        where = f" than Experiment.model{name and '.'}{name}, in the run {run_name!r}"
        check_same_tensors(weights, tensors_of(parts[name]), "model", where)
        copy_by_name(weights, into=tensors_of(parts[name]))
        given.update(parts[name].modules())
    for module in model.modules():
        initialise_from_data = getattr(module, "initialise_from_data", None)
        if initialise_from_data is not None and module not in given:
            if not isinstance(examples, Tensor):
                raise ArgumentError(
                    f"{type(module).__name__} has a method initialise_from_data, which takes images: the data is a "
                    f"{type(examples).__name__}"
                )
            initialise_from_data(examples, make_generator(examples.device, seed, "initialisation from data"))


def model_of_checkpoint(model: AnyModule, tensors: Mapping[str, Any], weights: str = "raw") -> AnyModule:
    """Returns the model with the raw or averaged weights of a loaded checkpoint.

    Raises:
        CheckpointError: if it is of another model, or has no averaged weights.

    Example: `with_checkpoint` calls it.
    """
    check_choice("weights", weights, WEIGHTS)
    parameters = tensors["parameters"] if weights == "raw" else tensors["weight_average"]
    if parameters is None:
        raise CheckpointError("the run kept no averaged weights (Experiment.weight_average_decay was None)")
    check_same_tensors({**parameters, **tensors["buffers"]}, tensors_of(model))
    return model_with_weights(model, parameters, tensors["buffers"])
