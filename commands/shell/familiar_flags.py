"""Flags of other trainers (diffusers' scripts, SimpleTuner, ai-toolkit, kohya, accelerate) and their counterparts here.

The error for such a flag names the counterpart. Names are compared without leading dashes, with `_` as `-`.
"""

from collections.abc import Collection
from difflib import get_close_matches

from secondcast.commands.shell.resuming import GO_ON

# Counterparts in order of preference: the first that the command has is named, with a value where it needs one.
_OURS: dict[tuple[str, ...], str] = {
    ("--learning-rate",): "lr unet-lr text-encoder-lr",
    ("--lr-warmup-steps",): "warmup warmup-ratio lr-warmup num-warmup-steps",
    ("--lr-schedule",): "lr-scheduler lr-scheduler-type scheduler-type",
    ("--weight-decay",): "adam-weight-decay wd",
    ("--max-grad-norm",): "gradient-clipping gradient-clip-val grad-clip clip-grad-norm",
    ("--grad-accum-steps",): "gradient-accumulation-steps gradient-accumulation accumulation-steps",
    ("--activation-checkpointing 1",): "gradient-checkpointing gradient-checkpointing-interval",
    ("--gpu-blocks",): (
        "blocks-to-swap block-swap cpu-offload enable-model-cpu-offload offload low-vram lowvram medvram group-offload"
    ),
    ("--steps",): (
        "max-train-steps num-train-steps max-steps train-steps total-steps iterations num-inference-steps "
        "inference-steps sampling-steps sample-steps num-steps num-train-epochs max-train-epochs epochs"
    ),
    ("--batch-size",): "train-batch-size per-device-train-batch-size per-gpu-batch-size micro-batch-size batchsize bs",
    ("--dtype", "--student-dtype", "--backbone-dtype"): (
        "mixed-precision precision torch-dtype weight-dtype save-precision bf16 fp16 full-bf16 half"
    ),
    ("--quantize",): (
        "base-model-precision quantization fp8 fp8-base load-in-8bit load-in-4bit int8 nf4 qfloat8 use-quantization"
    ),
    ("--guidance",): "guidance-scale cfg cfg-scale embedded-guidance-scale validation-guidance distilled-guidance",
    ("--text-length",): "max-sequence-length max-length max-token-length tokenizer-max-length t5xxl-max-token-length",
    ("--teacher", "--backbone", "--student"): (
        "pretrained-model-name-or-path pretrained-model pretrained-transformer-model-name-or-path model model-id "
        "model-path model-name-or-path base-model flux flux-path checkpoint-path"
    ),
    ("--out",): "output-dir output-path output out-dir outdir save-dir save-path output-folder output-file o",
    ("--prompts", "--cache"): (
        "prompt prompt-file prompts-file from-file validation-prompt dataset dataset-name dataset-config data "
        "train-data-dir instance-data-dir data-dir train-data caption-file captions"
    ),
    ("--samples-per-prompt",): "num-images-per-prompt num-images images-per-prompt repeats num-samples-per-prompt",
    ("--limit", "--num-prompts", "--num-trajectories"): "max-train-samples max-samples num-samples max-prompts n count",
    ("--checkpoint-every",): (
        "checkpointing-steps checkpoint-step-interval checkpoint-interval save-steps save-every save-every-n-steps "
        "validation-steps validation-epochs eval-steps eval-every"
    ),
    ("--sample-every",): ("sample-every-n-steps sample-every-n-epochs"),
    ("--keep-checkpoints",): "checkpoints-total-limit save-total-limit max-step-saves-to-keep save-last-n-steps",
    ("--report-to",): "log-with logger tracker wandb tensorboard use-wandb",
    ("--ema-decay",): "use-ema ema-validation",
    ("--huber-delta",): "huber-c huber-schedule",
    ("--loss",): "loss-type loss-fn",
    ("--timestep-weighting",): "weighting-scheme snr-gamma min-snr-gamma timestep-sampling",
    ("--config",): "settings recipe config-file config-path c",
    ("--fsdp",): "use-fsdp deepspeed use-deepspeed zero-stage",
    ("--workers",): "num-processes num-gpus gpus multi-gpu nproc-per-node num-workers dataloader-num-workers gpu-ids",
    ("--worker",): "num-machines machine-rank rank world-size",
    ("--attention-backend",): (
        "xformers sdpa flash-attn flash-attention attention attn-mode enable-xformers-memory-efficient-attention"
    ),
    ("--compile",): "torch-compile dynamo-backend use-compile",
    ("--device",): "cpu cuda gpu gpu-id use-cpu",
    ("--resolution",): "image-size size res image-resolution",
    ("--seed",): "random-seed global-seed data-seed training-seed",
    ("--schedule",): "scheduler noise-scheduler sampler sample-method",
    ("--dropout",): "dropout-rate dropout-p",
    ("--json",): "output-json print-json as-json",
    ("--quiet",): "silent disable-tqdm no-progress",
}
_BY_NAME = {name: flags for flags, names in _OURS.items() for name in names.split()}

_RESUMES = "Give the same command again: it keeps what is finished and resumes from there"
# Advice where no flag of the command is a counterpart.
_INSTEAD: dict[str, dict[str, str]] = {
    "resume resume-from-checkpoint resume-from resume-training continue continue-training load-checkpoint ckpt "
    "auto-resume": dict.fromkeys(GO_ON, _RESUMES),
    "output-dir output-path output out-dir outdir save-dir save-path output-folder output-name output-file run-name "
    "logging-dir o": {
        "train": "The folder of the run is the first argument: train RUN",
        "build": "The folder of the cache is the first argument: build CACHE",
        "export": "The folder to write is the second argument: export RUN OUT",
        "convert": "The folder to write is the second argument: convert SRC DST",
        "subset": "The folder to write is the second argument: subset SRC DST",
        "merge": "The folder to write is the last argument: merge SRC... DST",
        "demo": "The folder is the argument: demo DIR",
    },
    "num-processes num-gpus gpus multi-gpu nproc-per-node num-machines machine-rank gpu-ids rank world-size": {
        "train": "Start it with torchrun or accelerate launch: the processes divide each batch",
    },
    "num-workers dataloader-num-workers max-data-loader-n-workers prefetch-factor persistent-workers": {
        "train": "Data is prefetched by threads; there is no such option",
    },
    "optimizer optimizer-type use-8bit-adam adam-beta1 adam-beta2 adam-epsilon": {
        "train": "The optimizer is AdamW, set by --learning-rate and --weight-decay",
    },
    "gpu": {
        "plan recipe": "The GPU of the builds is --build-gpu, that of training --train-gpu",
    },
    "tflops": {
        "plan recipe": "The rate of the builds is --build-tflops, that of training --train-tflops",
    },
    "network-dim network-module network-alpha lora lora-rank lora-alpha lora-type": {
        "train": "All weights of the student are trained, without LoRA",
    },
    "push-to-hub hub-model-id hub-token": {
        "train": "Export the run, then upload that folder with `hf upload`",
        "export": "Upload the folder with `hf upload`",
    },
    "student run checkpoint": {
        "generate": "The student is the first argument: generate STUDENT",
        "evaluate score": "The student is the first argument: evaluate score STUDENT",
        "export": "The run is the first argument: export RUN OUT",
        "train": "The folder of the run is the first argument: train RUN",
    },
    "cache-latents cache-text-encoder-outputs vae-cache-preprocess": {
        "train": "`secondcast build` records latents and embeddings once; train reads them with --cache",
    },
}  # fmt: skip
# Of difflib: one wrong letter in six. With less, every word of an option is "close" to another.
_CLOSE = 0.8
_BY_COMMAND = {name: advice for names, advice in _INSTEAD.items() for name in names.split()}


def familiar_advice(typed: str, command: str, flags: Collection[str]) -> str | None:
    """Advice for a flag that a command does not have; None for an unknown flag.

    typed: the flag as given, such as "--lr" or "--learning_rate", or a key of a settings file.
    command: name of the command, such as "train" or "evaluate score".
    flags: flags of the command.
    """
    name = typed.lstrip("-").lower().replace("_", "-")
    if f"--{name}" in flags:
        return f"Use --{name}"
    for flag in _BY_NAME.get(name, ()):
        if flag.partition(" ")[0] in flags:
            return f"Use {flag}"
    return _BY_COMMAND.get(name, {}).get(command)


def close_advice(typed: str, command: str, flags: Collection[str]) -> str | None:
    """Advice for a misspelt flag, of the command or familiar from elsewhere; None if nothing is close.

    Arguments: see `familiar_advice`.
    """
    name = typed.lstrip("-").lower().replace("_", "-")
    own = {flag.lstrip("-"): f"Did you mean {flag}?" for flag in (*flags, "--help") if flag.startswith("--")}
    close = get_close_matches(name, own, n=1, cutoff=_CLOSE)
    if close:
        return own[close[0]]
    for meant in get_close_matches(name, [*_BY_NAME, *_BY_COMMAND], n=3, cutoff=_CLOSE):
        if advice := familiar_advice(meant, command, flags):
            return f"Did you mean --{meant}? {advice}"
    return None
