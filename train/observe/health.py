"""A look at the anchors and the connector of a few fixed images: numbers, overlays, answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from anchorformer.connectors.blocks import CrossAttention, MultiHeadAttention
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.errors import UserError
from data.images import load as load_image
from data.mixture import open_sources
from evals.questions import Question, question
from train.config import RunConfig
from train.distributed import World
from train.observe import anchors
from train.observe.journal import MEDIA
from train.observe.validation import SharedRespondent

SIDE = 336
"""Pixels per side that an overlay has at least."""
SHADE = 0.3
"""Brightness of what is no anchor, as a share of its own."""


@dataclass
class Look:
    """What passed through tower, selector and connector while a question was read; on the CPU.

    Attributes:
        pixels: (tiles, 3, H, W) as the tower takes them.
        chosen: features and anchors, once per call of the selector.
        attention: entropy of each of the connector's attentions.
    """

    pixels: list[Tensor] = field(default_factory=list)
    chosen: list[tuple[VisionFeatures, Anchors]] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)


class Taps:
    """Listens to a model inside a `with` block; what passes is seen, never changed.

    The connector's attention runs fused and leaves no probabilities: they are computed a second time here, from the
    queries and keys on their way into it. Where tiles of one image have different numbers of anchors, the last one of a
    tile counts as often as its row repeats it.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._stack = model, ExitStack()
        self.look = Look()
        self._passed: dict[str, Tensor] = {}

    def __enter__(self) -> Taps:
        keep = self._stack.enter_context
        keep(self._model.vision_tower.register_forward_pre_hook(self._tower))
        keep(self._model.selector.register_forward_hook(self._selector))
        for name, module in self._model.connector.named_modules():
            if isinstance(module, CrossAttention):
                keep(module.to_q.register_forward_hook(partial(self._pass, "queries")))
                keep(module.register_forward_hook(self._cross))
            elif isinstance(module, MultiHeadAttention):
                keep(module.to_q.register_forward_hook(partial(self._pass, "queries")))
                keep(module.to_k.register_forward_hook(partial(self._pass, "keys")))
                keep(module.register_forward_hook(self._multi_head))
            elif name.endswith("crossattention.attention"):  # transformers' Q-Former
                keep(module.query.register_forward_hook(partial(self._pass, "queries")))
                keep(module.key.register_forward_hook(partial(self._pass, "keys")))
                keep(module.register_forward_hook(self._q_former, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self) -> Look:
        """What has passed since this was called last."""
        look, self.look = self.look, Look()
        return look

    def _tower(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.look.pixels.append(arguments[0].detach().float().cpu())

    def _selector(self, _: nn.Module, arguments: tuple[Any, ...], out: Anchors) -> None:
        self.look.chosen.append((arguments[0], out))

    def _pass(self, name: str, _: nn.Module, __: object, out: Tensor) -> None:
        self._passed[name] = out.detach()

    def _cross(self, module: Any, arguments: tuple[Any, ...], _: object) -> None:
        _, key_values_BNE, *mask = arguments
        self._passed["keys"] = key_values_BNE.detach().chunk(2, dim=-1)[0]
        self._attend(module.head_width, *mask)

    def _multi_head(self, module: Any, arguments: tuple[Any, ...], _: object) -> None:
        self._attend(module.head_width, *arguments[3:])

    def _q_former(self, module: Any, _: object, named: dict[str, Any], __: object) -> None:
        mask_B11N = named["encoder_attention_mask"]
        self._attend(module.attention_head_size, None if mask_B11N is None else mask_B11N[:, 0, 0])

    def _attend(self, head_width: int, mask_BN: Tensor | None = None) -> None:
        def heads(x: Tensor) -> Tensor:
            return x.float().unflatten(-1, (-1, head_width)).transpose(1, 2)

        logits = heads(self._passed["queries"]) @ heads(self._passed["keys"]).transpose(-1, -2) * head_width**-0.5
        if mask_BN is not None:
            logits = logits.masked_fill(~mask_BN[:, None, None], -torch.inf)
        self.look.attention.append(anchors.entropy(logits))


def fixed_questions(config: RunConfig) -> list[Question]:
    """Records with one image, spread evenly over the run's sources, each with its first question.

    Raises:
        UserError: no record has an image that can be read.
    """
    sources = [source for source, _ in open_sources(config.data)]
    places = [(source, index) for source in sources for index in range(len(source))]
    found: dict[int, Question] = {}
    for share in range(config.health.images):
        for number in range(share * len(places) // config.health.images, len(places)):
            one = None if number in found else _seen(*places[number])
            if one is not None:
                found[number] = one
                break
    if not found:
        raise UserError(
            "there is no image to look at", found=f"{len(places)} records, none with one image that can be read",
            expected="at least one", remedy="leave health.every at null",
        )  # fmt: skip
    return [found[number] for number in sorted(found)]


def _seen(source: Any, index: int) -> Question | None:
    try:
        record = source[index]
        turns = tuple(turn for turn in record.turns if turn.role.value != "system")[:2]
        if len(record.images) != 1 or len(turns) < 2 or "<image>" not in turns[0].text:
            return None
        one = question(replace(record, id=f"{source.name}/{record.id}", turns=turns))
        load_image(one.images[0])
    except UserError:
        return None  # what becomes of it in training is for data.on_bad_record and data.on_bad_image to say
    return one


class Health:
    """The fixed images of a run, looked at whenever it is asked for."""

    def __init__(self, config: RunConfig, world: World, media: Path) -> None:
        self._config, self._world, self._media = config.health, world, media
        # From one rank, as in `Validation`.
        self._questions = world.broadcast(fixed_questions(config) if world.is_main else [])

    def look(self, step: int, model: Any, respondent: SharedRespondent) -> dict[str, Any]:
        """The record of one look; its overlays and answers are in the step's folder of `media` before it is returned.

        All ranks call it, and all of them look at every image: under ZeRO-3 none of them can alone.
        """
        looks, losses = [], []
        with Taps(model) as taps:
            for item in self._questions:
                losses += respondent.own.answer_losses([item])
                looks.append(taps.take())
        answers = respondent.own.answers(self._questions, self._config.max_new_tokens)
        if self._world.is_main:
            folder = self._media / MEDIA.format(step)
            folder.mkdir(parents=True, exist_ok=True)
            told = []
            for number, (item, look, answer, (loss, count)) in enumerate(
                zip(self._questions, looks, answers, losses, strict=True)
            ):
                overlays = []
                for index, picture in enumerate(_overlays(look, model.config)):
                    picture.save(folder / f"{number}-{index}.png")
                    overlays.append(f"{number}-{index}.png")
                told.append({
                    "id": item.id, "question": item.turns[-1][1], "answer": answer, "references": list(item.references),
                    "loss": loss / max(count, 1), "overlays": overlays,
                })  # fmt: skip
            # Last, so that a folder with answers has its overlays.
            (folder / "answers.json").write_text(json.dumps(told, indent=2) + "\n")
        return {"step": step, "images": len(self._questions), **measures(looks)}


def measures(looks: Sequence[Look]) -> dict[str, float]:
    """The numbers of a look (`train.observe.anchors`).

    What a selector or connector has no notion of is left out, and so is where the anchors lie if they are chosen over
    several tiles at once.
    """
    chosen = [pair for look in looks for pair in look.chosen if _is_by_tile(look)]
    found: dict[str, float] = {}
    if chosen and all(anchor.indices_BT is not None for _, anchor in chosen):
        hits_BP = torch.cat([_hits(features, anchor) for features, anchor in chosen])
        found |= {
            "coverage": anchors.coverage(hits_BP), "patches_used": anchors.patches_used(hits_BP),
            "common_share": anchors.common_share(hits_BP),
        }  # fmt: skip
    if chosen and all(features.cls_scores_BHN is not None for features, _ in chosen):
        scores_BHP = torch.cat([features.cls_scores_BHN.cpu() for features, _ in chosen])[..., 1:]  # type: ignore[union-attr]
        per_head = max(1, (chosen[0][1].tokens_BTV.shape[1] - 1) // scores_BHP.shape[1])
        found["head_overlap"] = anchors.head_overlap(scores_BHP, min(per_head, scores_BHP.shape[2]))
        found["cls_entropy"] = anchors.entropy(scores_BHP)
    attention = [value for look in looks for value in look.attention]
    if attention:
        found["connector_entropy"] = sum(attention) / len(attention)
    return {name: round(value, 6) for name, value in found.items()}


def _is_by_tile(look: Look) -> bool:
    return sum(len(features.tokens_BNV) for features, _ in look.chosen) == sum(map(len, look.pixels))


def _hits(features: VisionFeatures, anchor: Anchors) -> Tensor:
    assert anchor.indices_BT is not None
    return anchors.hits(anchor.indices_BT.cpu(), features.tokens_BNV.shape[1], has_cls=features.has_cls)


def _overlays(look: Look, config: Any) -> Iterator[Image.Image]:
    """Every tile as the tower saw it, what is no anchor darkened; as it is where no patch is chosen."""
    pixels_B3HW = torch.cat(look.pixels)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    tiles = ((pixels_B3HW * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    masks = [mask for features, anchor in look.chosen for mask in _masks(features, anchor)]
    for tile, mask in zip(tiles, masks if _is_by_tile(look) else [None] * len(tiles), strict=True):
        image = Image.fromarray(tile)
        scale = max(1, -(-SIDE // image.width))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if mask is not None:
            light = np.where(mask, 1.0, SHADE).astype(np.float32)
            shade = np.asarray(Image.fromarray(light).resize(image.size, Image.Resampling.NEAREST))
            image = Image.fromarray((np.asarray(image) * shade[..., None]).astype(np.uint8))
        yield image


def _masks(features: VisionFeatures, anchor: Anchors) -> Iterator[np.ndarray | None]:
    if anchor.indices_BT is None:
        yield from [None] * features.tokens_BNV.shape[0]
        return
    hits_BP = _hits(features, anchor)
    side = round(hits_BP.shape[1] ** 0.5)
    yield from (hits_BP.view(-1, side, side).numpy() if side * side == hits_BP.shape[1] else [None] * len(hits_BP))
