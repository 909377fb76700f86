"""What a run's keys have to fit each other in, beyond what each of them may be; imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from anchorformer.devices import Device
from anchorformer.errors import UserError
from anchorformer.template_names import TEMPLATE_NAMES
from train.choices import EngineName, Part, StageName
from train.zero import check_zero

if TYPE_CHECKING:
    from train.config import LoraConfig, RunConfig


def check(config: RunConfig) -> None:
    """Checks that span several groups; the range of a single number stands at its field.

    Raises:
        UserError: global batch not divisible by the ranks, both or none of epochs and max_steps, finetune
            without `init_from`, unknown template, a ZeRO that `check_zero` refuses, validation without tasks or the
            other way round, compiled parts or a folded connector under ZeRO-3, an integration that is named and not
            there, cached features of a trained tower, an adapter that is not trained, has no layers, or is to be
            quantized where that is not possible, a profile of no steps or of more than `max_steps`.
    """
    stage, hardware = config.stage, config.hardware
    if stage.global_batch % config.world_size:
        raise UserError(
            "stage.global_batch cannot be dealt evenly",
            found=f"{stage.global_batch} samples over {config.world_size} rank(s)",
            expected=f"a multiple of {config.world_size}",
            remedy=f"set stage.global_batch={math.ceil(stage.global_batch / config.world_size) * config.world_size}",
        )
    if (stage.epochs is None) == (stage.max_steps is None):
        raise UserError(
            "the stage's length is not clear",
            found=f"epochs={stage.epochs}, max_steps={stage.max_steps}",
            expected="exactly one of them set",
            remedy="set stage.epochs=null with stage.max_steps, or drop max_steps",
        )
    if stage.name is StageName.finetune and not config.init_from:
        raise UserError(
            "stage=finetune has nothing to start from",
            found="init_from=null",
            expected="the align run whose connector is to be finetuned, or a model folder",
            remedy="add init_from=checkpoints/<align run>",
        )
    check_zero(
        config.zero, ranks_per_node=hardware.ranks, nodes=hardware.nodes,
        by_deepspeed=config.engine is EngineName.deepspeed, on_cpu=hardware.device is Device.cpu,
    )  # fmt: skip
    if config.zero.stage == 3 and hardware.compile:
        raise UserError(
            "compiled parts do not go with ZeRO-3, which fetches weights by hooks inside of them",
            found=f"hardware.compile={[part.value for part in hardware.compile]}, zero.stage=3",
            expected="hardware.compile=[], or zero.stage up to 2", remedy="set hardware.compile=[]",
        )  # fmt: skip
    if config.zero.stage == 3 and config.model.connector.get("fold_kv"):
        raise UserError(
            "the connector's folded product does not go with ZeRO-3, which fetches weights by hooks of their modules",
            found="model.connector.fold_kv=true, zero.stage=3",
            expected="model.connector.fold_kv=false, or zero.stage up to 2", remedy="set model.connector.fold_kv=false",
        )  # fmt: skip
    if (config.eval.every is None) != (not config.eval.tasks):
        raise UserError(
            "validation is half described",
            found=f"eval.every={config.eval.every}, eval.tasks={sorted(config.eval.tasks)}",
            expected="both, or neither", remedy='e.g. eval.every=100 "eval.tasks=[docvqa_val,chartqa_test]"',
        )  # fmt: skip
    named = [name for name, parts in (("stage.trains", stage.trains), ("hardware.compile", hardware.compile))
             if Part.integration in parts]  # fmt: skip
    if named and config.model.integration is None:
        raise UserError(
            f"{' and '.join(named)} name an integration that the model does not have",
            found="model.integration=null", expected="an integration, or no mention of it",
            remedy=f"add integration=eram_v, or leave it out of {' and '.join(named)}",
        )  # fmt: skip
    if config.data.feature_cache is not None and Part.vision_tower in stage.trains:
        raise UserError(
            "features of a tower that is being trained cannot be kept",
            found=f"data.feature_cache={config.data.feature_cache}, stage.trains with vision_tower",
            expected="a frozen vision tower, or no cache", remedy="set data.feature_cache=null",
        )  # fmt: skip
    if stage.lora is not None:
        check_lora(config, stage.lora)
    if config.profiled is not None and stage.max_steps is not None:
        config.profiled.check(stage.max_steps)
    if stage.template not in TEMPLATE_NAMES:
        raise UserError(
            "stage.template is unknown",
            found=stage.template,
            expected=f"one of {', '.join(TEMPLATE_NAMES)}",
            remedy="v1 is Vicuna's conversation, plain is a caption alone, chat is the tokenizer's own template",
        )


def check_lora(config: RunConfig, lora: LoraConfig) -> None:
    """
    Raises:
        UserError: see `check`.
    """
    if Part.language_model not in config.stage.trains:
        raise UserError(
            "stage.lora adapts a language model that the stage does not train",
            found=f"stage.trains of {', '.join(part.value for part in config.stage.trains)}",
            expected="language_model among them, with the adapter's learning rate",
            remedy="set stage.trains.language_model.lr=2e-4, or lora=none",
        )  # fmt: skip
    if not lora.targets:
        raise UserError(
            "stage.lora adapts no layer", found="stage.lora.targets=[]", expected="names of linear layers",
            remedy="e.g. stage.lora.targets=[q_proj,v_proj], or lora=none",
        )  # fmt: skip
    if lora.quantize and config.zero.stage == 3 and config.engine is EngineName.deepspeed:
        raise UserError(
            "4-bit weights do not go with ZeRO-3: it parts and gathers tensors without the scales that belong to them",
            found="stage.lora.quantize=true, zero.stage=3", expected="zero.stage up to 2",
            remedy="set zero=zero2, or lora=default to keep the weights whole under ZeRO-3",
        )  # fmt: skip
    if lora.quantize and config.hardware.device is Device.cpu:
        raise UserError(
            "4-bit weights are computed with on CUDA only", found="stage.lora.quantize=true, hardware.device=cpu",
            expected="hardware.device=cuda", remedy="set lora=default on CPU",
        )  # fmt: skip
