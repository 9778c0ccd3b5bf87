"""Small captioning models: an ONNX tagger with known weights, and models of transformers with random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

SIDE = 16
WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "orange",
    "disc",
    "square",
    "boat",
    "tree",
    "house",
    "sky",
    "over",
    "under",
    "near",
    "bright",
    "dark",
    "old",
    "new",
    "photo",
]
CHAT = "{% for m in messages %}user : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"  # noqa: E501


def write_tagger(folder: Path, *, batch: int | None = None, side: int = 8) -> Path:
    """Write a tagger whose scores are known: of the mean color of its input, in the order blue, green, red."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tags = [("general", 9), ("much_blue", 0), ("much_green", 0), ("o_o", 0), ("miku_(series)", 4)]
    # Score 1 / (1 + exp(-10 (channel / 255 - 0.5))): above 0.5 for a channel above 127.5.
    weights = np.zeros((3, len(tags)), np.float32)
    weights[0, 1] = weights[1, 2] = weights[2, 3] = weights[2, 4] = 10 / 255
    bias = np.full(len(tags), -5, np.float32)
    bias[0] = 5
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "weights"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["scores"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch or "N", side, side, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch or "N", len(tags)])],
        [
            numpy_helper.from_array(np.array([1, 2]), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    rows = [f"{number},{name},{category},1" for number, (name, category) in enumerate(tags)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    return folder


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[DEC]", "<image>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, "user", "assistant", ":"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]",
             "bos_token": "[DEC]", "eos_token": "[SEP]",
             "additional_special_tokens": ["<image>"]}  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=words, **{**names, **changes})


def sharpened(model: torch.nn.Module, factor: float = 12) -> Any:
    """Make the weights of a random model large, so that its text depends on the image."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "position" not in name:
                parameter.mul_(factor)
    return model.eval()


def write_encoder_decoder(folder: Path) -> Path:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    words = tokenizer()
    encoder = ViTModel(ViTConfig(**small, image_size=SIDE, patch_size=4))
    decoder = BertLMHeadModel(BertConfig(**small, vocab_size=len(words), is_decoder=True, add_cross_attention=True))
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 4, 0, 2
    sharpened(model).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_blip(folder: Path) -> Path:
    torch.manual_seed(1)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    words = tokenizer()
    text = {**small, "vocab_size": len(words), "encoder_hidden_size": 32, "projection_dim": 32, "bos_token_id": 4,
            "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2, "max_position_embeddings": 64}  # fmt: skip
    config = BlipConfig(
        text_config=text,
        vision_config={**small, "image_size": SIDE, "patch_size": 4, "projection_dim": 32},
        projection_dim=32,
    )
    sharpened(BlipForConditionalGeneration(config), 30).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), words).save_pretrained(folder)
    return folder


def write_chat_model(folder: Path) -> Path:
    torch.manual_seed(2)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    words = tokenizer(eos_token="[SEP]")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=SIDE, patch_size=4).to_dict(),
        text_config=LlamaConfig(**small, num_key_value_heads=2, vocab_size=len(words), pad_token_id=0, bos_token_id=4,
                                eos_token_id=2).to_dict(),
        image_token_index=5,
        image_seq_length=16,
        vision_feature_layer=-1,
    )  # fmt: skip
    sharpened(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    LlavaProcessor(
        images, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_classifier(folder: Path) -> Path:
    """Write the config of a model that does not caption images."""
    folder.mkdir()
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder
