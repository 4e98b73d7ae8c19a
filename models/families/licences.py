"""Licences of the supported models, as the pages of the models on the hub state them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Licence:
    """The licence of a model.

    identifier: `license` in the metadata of a model card; "other" for one that the hub has no identifier for.
    name: `license_name`, where the identifier is "other".
    link: page of its text.
    non_commercial: whether it restricts derivatives and outputs.
    """

    identifier: str
    name: str | None = None
    link: str | None = None
    non_commercial: bool = False


APACHE = Licence(identifier="apache-2.0")
OPENRAIL = Licence(identifier="openrail++")


def own_licence(name: str, model: str, *, non_commercial: bool = False) -> Licence:
    """A licence of the owner of a model, beside its weights on the hub.

    name: as in the metadata of its card.
    model: name on the hub, with its owner.
    """
    link = f"https://huggingface.co/{model}/blob/main/LICENSE.md"
    return Licence(identifier="other", name=name, link=link, non_commercial=non_commercial)
