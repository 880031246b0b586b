"""Tiny models of what `hf:` and `timm:` read, saved as their owners save them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

_SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT = {**_SMALL, "vocab_size": 50, "max_position_embeddings": 16}
_TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_WORDS = "a video photo of something bright dark sound low high very and the"
_AS_IT_IS = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}

Owner = Callable[[torch.Tensor], torch.Tensor]
"""Decoded views [B, 3, T, H, W] uint8, or [B, 1, n] float32 -> the owner's features [B, D]."""


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random values everywhere: zeros and ones would hide a part that is not read."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value += 0.05 * torch.randn(value.shape, generator=generator)
    return model.eval()


def saved(model: torch.nn.Module, processor: object, folder: Path) -> torch.nn.Module:
    """The model, as a folder with its processor's configuration."""
    shaken(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path) -> object:
    """A tokenizer of a few words, as the folder's own."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<s>", "</s>", "<pad>", "<unk>"]
    words = {word: number for number, word in enumerate([*special, *_WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), special, strict=True))
    made = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=12, **names)
    made.save_pretrained(folder)
    return made


def _frames(view: torch.Tensor) -> list[list]:
    """[B, 3, T, H, W] -> clips of frames [H, W, 3], as owners' processors take them."""
    return [[frame.permute(1, 2, 0).numpy() for frame in clip.transpose(0, 1)] for clip in view]


def _each_frame(encode: Callable[..., torch.Tensor], processor: Callable[..., dict]) -> Owner:
    """Frames one by one, averaged."""
    return lambda view: torch.stack([encode(**processor(images=clip, **_AS_IT_IS)).mean(0) for clip in _frames(view)])


def videomae(folder: Path, *, task: bool = False) -> Owner:
    import transformers as t

    config = t.VideoMAEConfig(**_SMALL, image_size=32, patch_size=16, num_frames=4, use_mean_pooling=task)
    model_class = t.VideoMAEForVideoClassification if task else t.VideoMAEForPreTraining
    processor = t.VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = saved(model_class(config), processor, folder)

    def features(view: torch.Tensor) -> torch.Tensor:
        tokens = model.videomae(**processor(_frames(view), **_AS_IT_IS)).last_hidden_state.mean(1)
        return model.fc_norm(tokens) if task else tokens

    return features


def vjepa2(folder: Path, *, task: bool = False) -> Owner:
    import transformers as t

    config = t.VJEPA2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=16,
        crop_size=32,
        frames_per_clip=4,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
    )
    processor = t.VJEPA2VideoProcessor(crop_size=32)
    model = saved((t.VJEPA2ForVideoClassification if task else t.VJEPA2Model)(config), processor, folder)

    def features(view: torch.Tensor) -> torch.Tensor:
        pixels = processor(list(view.transpose(1, 2)), **_AS_IT_IS)["pixel_values_videos"]
        if not task:
            return model(pixels, skip_predictor=True).last_hidden_state.mean(1)
        return model.pooler(model.vjepa2(pixels, skip_predictor=True).last_hidden_state)

    return features


def clip(folder: Path) -> Owner:
    import transformers as t

    config = t.CLIPConfig(
        vision_config={**_SMALL, "image_size": 32, "patch_size": 16}, text_config={**_TEXT, "pad_token_id": 2}
    )
    processor = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = saved(t.CLIPModel(config), processor, folder)
    return _each_frame(lambda **x: model.vision_model(**x).pooler_output, processor)


def siglip(folder: Path) -> Owner:
    import transformers as t

    config = t.SiglipConfig(
        vision_config={**_SMALL, "image_size": 32, "patch_size": 16}, text_config={**_TEXT, "pad_token_id": 2}
    )
    processor = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    model = saved(t.SiglipModel(config), processor, folder)
    return _each_frame(lambda **x: model.vision_model(**x).pooler_output, processor)


def dinov2(folder: Path) -> Owner:
    import transformers as t

    config = t.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2)
    config.image_size, config.patch_size = 64, 16  # positions are interpolated to frames of 32
    processor = t.BitImageProcessor(
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    model = saved(t.Dinov2Model(config), processor, folder)
    return _each_frame(lambda **x: model(**x).pooler_output, processor)


def _sound(encode: Callable[..., torch.Tensor], extractor: Callable[..., dict], **more: object) -> Owner:
    def features(view: torch.Tensor) -> torch.Tensor:
        waves = [wave[0].numpy() for wave in view]
        return encode(**extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt") | more)

    return features


def ast(folder: Path) -> Owner:
    import transformers as t

    config = t.ASTConfig(**_SMALL, patch_size=8, max_length=64, num_mel_bins=32)
    extractor = t.ASTFeatureExtractor(num_mel_bins=32, max_length=64)
    model = saved(t.ASTForAudioClassification(config), extractor, folder)
    return _sound(lambda **x: model.audio_spectrogram_transformer(**x).pooler_output, extractor)


def _speech(kind: str, folder: Path, **more: object) -> Owner:
    import transformers as t

    config = getattr(t, f"{kind}Config")(
        **_SMALL,
        conv_dim=(16, 16),
        conv_kernel=(10, 4),
        conv_stride=(5, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        vocab_size=12,
        **more,
    )
    extractor = t.Wav2Vec2FeatureExtractor()
    model = saved(getattr(t, f"{kind}ForCTC")(config), extractor, folder)
    base = getattr(model, kind.lower())
    return _sound(lambda input_values, **_: base(input_values).last_hidden_state.mean(1), extractor)


def wav2vec2(folder: Path) -> Owner:
    return _speech("Wav2Vec2", folder)


def hubert(folder: Path) -> Owner:
    return _speech("Hubert", folder, do_stable_layer_norm=True, feat_extract_norm="layer")


def clap(folder: Path, *, fused: bool = False) -> Owner:
    import transformers as t

    sound = {"patch_embeds_hidden_size": 8, "depths": [2, 1], "num_attention_heads": [2, 2], "num_hidden_layers": 2}
    sound |= {"hidden_size": 16, "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "enable_fusion": fused}
    extractor = t.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16000,
        frequency_max=7000,
        max_length_s=2,
        truncation="fusion" if fused else "rand_trunc",
    )
    model = saved(t.ClapModel(t.ClapConfig(audio_config=sound, text_config=_TEXT)), extractor, folder)
    # Of a batch without long clips the owner draws one that is to count as long.
    return _sound(
        lambda input_features, **_: (
            model.audio_model(input_features, is_longer=torch.zeros(len(input_features), 1)).pooler_output
        ),
        extractor,
    )


OWNERS: dict[str, Callable[[Path], Owner]] = {
    "videomae": videomae,
    "videomae, classifier": partial(videomae, task=True),
    "vjepa2": vjepa2,
    "vjepa2, classifier": partial(vjepa2, task=True),
    "clip": clip,
    "siglip": siglip,
    "dinov2": dinov2,
    "ast": ast,
    "wav2vec2": wav2vec2,
    "hubert": hubert,
    "clap": clap,
    "clap, fused": partial(clap, fused=True),
}


def timm_model(name: str, file: Path) -> Owner:
    """A model of timm as published, with its classifier, and what its owner makes of frames before that."""
    import timm
    from PIL import Image
    from safetensors.torch import save_file

    model = shaken(timm.create_model(name))
    save_file(model.state_dict(), file)
    *_, as_tensor, normalise = timm.data.create_transform(**timm.data.resolve_model_data_config(model)).transforms

    def features(view: torch.Tensor) -> torch.Tensor:
        clips = [
            torch.stack([normalise(as_tensor(Image.fromarray(frame))) for frame in clip]) for clip in _frames(view)
        ]
        return torch.stack([model.forward_head(model.forward_features(c), pre_logits=True).amax(0) for c in clips])

    return features


def views(kind: str, modality: object, clips: int = 2) -> torch.Tensor:
    """Decoded views of a modality's shape."""
    ((shape, _),) = modality.part_shapes()
    generator = torch.Generator().manual_seed(3)
    if kind == "video":
        return torch.randint(0, 256, (clips, *shape), generator=generator, dtype=torch.uint8)
    return torch.rand((clips, *shape), generator=generator) - 0.5
