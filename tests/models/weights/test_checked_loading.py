"""No checkpoint is loaded that is not exactly what its class reads: 0 silent, 0 tracebacks, one line with the names."""

import json
import math
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from secondcast import models
from secondcast.models.backbone import Backbone
from secondcast.models.families.encoders.clip import PooledClip
from secondcast.models.families.flux import FLUX
from secondcast.models.geometry import geometry_of
from secondcast.models.student.student import load_student, new_student, save_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import TeacherFolder, find_teacher
from secondcast.models.teacher.image_decoder import ImageDecoder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder, load_conditioning_encoder
from secondcast.models.teacher.weights import check_teacher_weights
from secondcast.models.weights.checked_loading import KNOWN, check_weights, load_checked, read_tensors
from secondcast.models.weights.files import CheckpointSource
from secondcast.storage_schemas.errors import SecondcastError, StudentError, TeacherError
from secondcast.trainer.run.export import export
from tests.models.families.random_teacher import make_teacher
from tests.models.student.encoders import make_encoder_folder, rewrite_config
from tests.models.weights.damaged_weights import DAMAGES, every_tensor, rewrite, shard, weight_file

CPU = torch.device("cpu")
GEOMETRY = geometry_of(height=16, width=16, token_px=4, channels=16)
SOURCE = CheckpointSource(where="it", error=TeacherError, again="download it again")


@dataclass(frozen=True, kw_only=True)
class Component:
    """part: where it is in the copied folder. layers: the key of its config.json that counts layers."""

    made: Path
    part: str
    layers: str
    load: Callable[[Path], object]
    error: type[SecondcastError]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Two of everything that is counted, so that one fewer leaves one."""
    return make_teacher(tmp_path_factory.mktemp("loading") / "teacher", num_layers=2)


@pytest.fixture(scope="module")
def identity(teacher):
    return find_teacher(str(teacher), ()).identity(text_length=12, hashed=False)


@pytest.fixture(scope="module")
def components(tmp_path_factory, teacher, identity) -> dict[str, Component]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def of_teacher(path: Path) -> TeacherFolder:
        return TeacherFolder(path=path, source="t")

    def begin(path: Path) -> object:
        return new_student(str(path), identity, init="auto", dropout=0.0, seed=0)

    config = json.loads((teacher / "text_encoder_2/config.json").read_bytes())
    torch.manual_seed(1)
    T5EncoderModel(T5Config(**config | {"d_model": 16, "num_heads": 2})).save_pretrained(folder / "t5")
    make_encoder_folder(folder / "bert", "bert")
    rewrite_config(folder / "bert", num_hidden_layers=1)
    student = begin(folder / "t5")
    save_student(student, folder / "run/checkpoint-00000001/student", tokenizer=None)
    encoder = begin(folder / "bert")
    save_student(encoder, folder / "encoder", tokenizer=own_tokens(folder / "bert", encoder).files)
    saved = folder / "run/checkpoint-00000001/student"
    export(saved, folder / "diffusers")
    export(saved, folder / "distillt5", to="distillt5")
    load = {"dtype": torch.float32, "device": CPU}
    teachers = {
        "text_encoder_2": ("num_layers", lambda path: TeacherTextEncoder.load(of_teacher(path), **load)),
        "text_encoder": ("num_hidden_layers", lambda path: load_conditioning_encoder(of_teacher(path), **load)),
        "transformer": ("num_layers", lambda path: Backbone.load(path, GEOMETRY, text_length=12, **load)),
        "vae": ("layers_per_block", lambda path: ImageDecoder.load(of_teacher(path), GEOMETRY, device=CPU)),
    }
    students = {
        "run checkpoint": ("run", "checkpoint-00000001/student", "num_layers"),
        "encoder student": ("encoder", ".", "encoder_config.num_hidden_layers"),
        "diffusers export": ("diffusers", ".", "num_layers"),
        "distillt5 export": ("distillt5", ".", "num_layers"),
    }
    return {
        **{
            part: Component(made=teacher, part=part, layers=layers, load=loads, error=TeacherError)
            for part, (layers, loads) in teachers.items()
        },
        **{
            name: Component(
                made=folder / place,
                part=part,
                layers=layers,
                load=lambda path, part=part: load_student(path / part),
                error=StudentError,
            )
            for name, (place, part, layers) in students.items()
        },
        "T5 to begin with": Component(
            made=folder / "t5", part=".", layers="num_layers", load=begin, error=StudentError
        ),
        "BERT to begin with": Component(
            made=folder / "bert", part=".", layers="num_hidden_layers", load=begin, error=StudentError
        ),
    }


NAMES = (
    *("text_encoder_2", "text_encoder", "transformer", "vae", "T5 to begin with", "BERT to begin with"),
    *("run checkpoint", "encoder student", "diffusers export", "distillt5 export"),
)


def refused(component: Component, folder: Path) -> str:
    """The one line with which a component is refused."""
    before = torch.get_rng_state()
    with pytest.raises(component.error) as caught:
        component.load(folder)
    assert torch.equal(torch.get_rng_state(), before), "random numbers were drawn"
    said = str(caught.value)
    assert said.startswith(f"{folder / component.part} cannot be loaded: ") and "\n" not in said, said
    assert said.count("; ") >= 1, f"no fix: {said}"
    return said


@pytest.mark.thorough
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_what_is_wrong(name, damage, components, tmp_path):
    component = components[name]
    folder = shutil.copytree(component.made, tmp_path / "copy")
    wrong = DAMAGES[damage](folder / component.part, component.layers)
    said = refused(component, folder)
    for part in wrong:
        assert part in said, (part, said)
    if component.error is TeacherError:
        with pytest.raises(TeacherError) as caught:
            role = next(role for role, part in FLUX.parts.items() if part.folder == component.part)
            check_teacher_weights(TeacherFolder(path=folder, source="t"), [role])
        assert str(caught.value) == said


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_of_a_checkpoint_can_be_lost(name, components, tmp_path):
    component = components[name]
    for tensor in every_tensor(component.made / component.part):
        folder = shutil.copytree(component.made, tmp_path / tensor)
        rewrite(
            folder / component.part,
            lambda tensors, tensor=tensor: {key: value for key, value in tensors.items() if key != tensor},
        )
        if name == "BERT to begin with" and tensor.startswith("pooler."):
            # The encoder is taken without it.
            component.load(folder)
        else:
            assert tensor in refused(component, folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_checkpoint_is_loaded_from_one_file_and_from_several(name, components, tmp_path):
    component = components[name]
    folder = shutil.copytree(component.made, tmp_path / "copy")
    one = component.load(folder)
    shard(folder / component.part, 3)
    several = component.load(folder)
    for ours, theirs in zip(tensors_of(one), tensors_of(several), strict=True):
        assert torch.equal(ours, theirs)


def tensors_of(loaded: object) -> list[torch.Tensor]:
    if isinstance(loaded, ImageDecoder):
        loaded = loaded._vae
    elif isinstance(loaded, Backbone):
        loaded = loaded.transformer
    elif isinstance(loaded, TeacherTextEncoder | PooledClip):
        loaded = loaded.model
    return list(loaded.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (T5EncoderModel, "text_encoder_2"),
        (CLIPTextModel, "text_encoder"),
        (FluxTransformer2DModel, "transformer"),
        (AutoencoderKL, "vae"),
    ],
)
def test_the_weights_are_those_that_the_library_loads(kind, part, dtype, teacher):
    ours = load_checked(kind, teacher / part, SOURCE, dtype=dtype)
    theirs = kind.from_pretrained(teacher / part, torch_dtype=dtype, use_safetensors=True)
    assert not ours.training and ours.dtype == dtype
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor) and ours.state_dict()[name].dtype == tensor.dtype, name
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())


def test_floating_dtypes_are_cast_and_known(teacher, tmp_path):
    folder = shutil.copytree(teacher / "text_encoder_2", tmp_path / "t5")
    expected = load_checked(T5EncoderModel, folder, SOURCE, dtype=torch.float32).state_dict()
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    rewrite(folder, lambda tensors: {n: t.to(dtypes[i % 3]) for i, (n, t) in enumerate(tensors.items())})
    assert check_weights(T5EncoderModel, folder, SOURCE).dtypes == ["BF16", "F32", "F64"]
    found = load_checked(T5EncoderModel, folder, SOURCE, dtype=torch.float32).state_dict()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == torch.float32 for name, tensor in expected.items()
    )


def test_a_t5_xxl_is_checked_without_reading_its_data(tmp_path):
    config = Path(models.__file__).parent / "configs/FLUX.1-dev/text_encoder_2/config.json"
    shutil.copyfile(config, tmp_path / "config.json")
    with torch.device("meta"):
        shapes = {
            name: list(t.shape) for name, t in T5EncoderModel(T5Config.from_json_file(config)).state_dict().items()
        }
    del shapes["encoder.embed_tokens.weight"]
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        # A hole, which takes no room on disk.
        file.truncate(8 + len(data) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(check_weights(T5EncoderModel, tmp_path, SOURCE).tensors) == 219
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert end > 9e9 and grown_kib < 2**18


def test_of_a_whole_t5_the_encoder_is_taken(tmp_path, identity):
    config = T5Config(
        vocab_size=identity.text_encoder_config["vocab_size"], d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(2)
    whole = T5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "t5")
    # T5 v1.1 has an output layer of its own, and old files hold the embedding under both names.
    rewrite(
        tmp_path / "t5",
        lambda tensors: {
            **tensors,
            "lm_head.weight": torch.ones(config.vocab_size, 16),
            "encoder.embed_tokens.weight": tensors["shared.weight"],
        },
    )
    student = new_student(str(tmp_path / "t5"), identity, init="pretrained", dropout=0.0, seed=0)
    weights = student.encoder.encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.encoder.state_dict().items())


def test_two_different_tensors_under_the_names_of_one_are_refused(teacher, tmp_path):
    folder = shutil.copytree(teacher / "text_encoder_2", tmp_path / "t5")
    rewrite(folder, lambda tensors: {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"] + 1})
    with pytest.raises(TeacherError) as caught:
        load_checked(T5EncoderModel, folder, SOURCE, dtype=torch.float32)
    assert str(caught.value) == (
        "it cannot be loaded: encoder.embed_tokens.weight and shared.weight differ, expected one tensor under two "
        "names: the file is damaged; download it again"
    )


def old_bert(folder: Path) -> torch.nn.Module:
    """BERT as it was published: heads beside it, LayerNorm's old names, a buffer that is computed today."""
    config = BertConfig.from_pretrained(folder)
    torch.manual_seed(3)
    model = BertForPreTraining(config)
    model.save_pretrained(folder)
    rewrite(
        folder,
        lambda tensors: {
            "bert.embeddings.position_ids": torch.arange(config.max_position_embeddings)[None],
            **{
                name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
                for name, value in tensors.items()
            },
        },
    )
    return model.bert


def old_gpt2(folder: Path) -> torch.nn.Module:
    """GPT-2 as it was published: without a prefix, with its masks as bytes."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config.from_pretrained(folder))
    model.transformer.save_pretrained(folder)
    mask = {"h.0.attn.bias": torch.ones(1, 1, 20, 20).tril().byte(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(folder, lambda tensors: {**tensors, **mask})
    return model.transformer


@pytest.mark.parametrize(("family", "publish"), [("bert", old_bert), ("gpt2", old_gpt2)])
def test_old_names_heads_and_saved_buffers_of_published_encoders_are_known(family, publish, identity, tmp_path):
    folder = make_encoder_folder(tmp_path / family, family)
    weights = publish(folder).state_dict()
    encoder = new_student(str(folder), identity, init="pretrained", dropout=0.0, seed=0).encoder.state_dict()
    assert encoder and all(torch.equal(value, weights[name]) for name, value in encoder.items())


def test_a_layer_more_is_no_head(identity, tmp_path):
    folder = make_encoder_folder(tmp_path / "bert", "bert")
    old_bert(folder)
    more = {"bert.encoder.layer.1.output.dense.bias": torch.zeros(16)}
    rewrite(folder, lambda tensors: {**tensors, **more})
    with pytest.raises(StudentError) as caught:
        new_student(str(folder), identity, init="pretrained", dropout=0.0, seed=0)
    assert str(caught.value) == (
        f"{folder} cannot be loaded: 1 tensor is unexpected (bert.encoder.layer.1.output.dense.bias): config.json has "
        f"1 block in encoder.layer, the file has 2; give weights and a config.json of the same model"
    )


def test_an_autoencoder_with_the_old_names_of_attention_is_loaded(teacher, tmp_path):
    folder = shutil.copytree(teacher / "vae", tmp_path / "vae")
    expected = load_checked(AutoencoderKL, folder, SOURCE, dtype=torch.float32).state_dict()

    def old(name: str) -> str:
        for before, now in KNOWN["AutoencoderKL"].renamed:
            name = name.replace(now, before)
        return name

    rewrite(folder, lambda tensors: {old(name): tensor for name, tensor in tensors.items()})
    assert any(".proj_attn." in name for name in every_tensor(folder))
    found = load_checked(AutoencoderKL, folder, SOURCE, dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("role", "part"), [("large_text_encoder", "text_encoder_2"), ("transformer", "transformer")])
def test_a_stated_quantization_is_refused(role, part, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "t")
    rewrite_config(folder / part, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(TeacherError) as caught:
        check_teacher_weights(TeacherFolder(path=folder, source="t"), [role])
    assert str(caught.value) == (
        f"{folder / part} cannot be loaded: config.json has a quantization_config (gptq), expected safetensors of "
        "BF16, F16, F32 or F64: quantized weights have a packed layout, which is not supported; give the unquantized "
        "checkpoint"
    )


@pytest.mark.parametrize(
    "beside",
    ["encoder.block.0.layer.0.SelfAttention.q.weight.absmax", "encoder.final_layer_norm.scale_weight", "scaled_fp8"],
)
def test_the_scales_of_a_packed_layout_are_known_as_such(beside, teacher, tmp_path):
    folder = shutil.copytree(teacher / "text_encoder_2", tmp_path / "t5")
    rewrite(folder, lambda tensors: {**tensors, beside: torch.ones(1)})
    with pytest.raises(TeacherError) as caught:
        load_checked(T5EncoderModel, folder, SOURCE, dtype=torch.float32)
    assert str(caught.value) == (
        f"it cannot be loaded: 1 tensor is unexpected ({beside}): a quantized or packed layout is not supported; "
        f"give the unquantized checkpoint"
    )


def test_tensors_of_a_run_are_read_by_their_names_and_shapes(tmp_path):
    file = tmp_path / "optimizer.safetensors"
    save_file({"exp_avg/a": torch.ones(2, 3), "step/a": torch.tensor(1.0)}, file)
    expected = {"exp_avg/a": (2, 3), "step/a": ()}
    assert read_tensors(file, expected, SOURCE, kind="the optimizer").keys() == expected.keys()
    for wanted, said in (
        ({**expected, "exp_avg/b": (1,)}, r"1 of the 3 tensors of the optimizer is missing \(exp_avg/b\)"),
        ({"step/a": ()}, r"1 tensor is unexpected \(exp_avg/a\)"),
        (
            {**expected, "exp_avg/a": (3, 2)},
            r"1 tensor is of another shape \(exp_avg/a: \[2, 3\], the optimizer expects",
        ),
    ):
        with pytest.raises(TeacherError, match=said):
            read_tensors(file, wanted, SOURCE, kind="the optimizer")
    assert load_file(file).keys() == expected.keys() and weight_file(tmp_path) == file
