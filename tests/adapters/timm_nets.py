"""Models of timm with a few thousand weights, for images of 32 pixels. timm is imported when one is built."""

import torch
from torch import nn

PIXELS = 32
LABELS = 5


def resnet(labels=LABELS):
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], labels, channels=(8, 8, 12, 16))


def convnext(labels=LABELS):
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=labels, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), ls_init_value=0.5)


def mobilenet_v2(labels=LABELS):
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = decode_arch_def([["ds_r1_k3_s1_c8"], ["ir_r2_k3_s2_e3_c12_se0.25"], ["ir_r1_k5_s2_e3_c16"]])
    return EfficientNet(blocks, num_classes=labels, num_features=20, stem_size=8, act_layer=nn.ReLU6)


def mobilenet_v3(labels=LABELS):
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.mobilenetv3 import MobileNetV3

    blocks = decode_arch_def([["ds_r1_k3_s2_e1_c8_se0.25_nre"], ["ir_r1_k3_s2_e4_c12_se0.25"], ["cn_r1_k1_s1_c16"]])
    return MobileNetV3(blocks, num_classes=labels, num_features=24, stem_size=8, act_layer=nn.Hardswish)


def vit(labels=LABELS, **options):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(PIXELS, 8, num_classes=labels, embed_dim=16, depth=2, num_heads=2, **options)


def distilled_vit(labels=LABELS):
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(
        img_size=PIXELS, patch_size=8, num_classes=labels, embed_dim=16, depth=2, num_heads=2
    )


def swin(labels=LABELS):
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        PIXELS, 2, num_classes=labels, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2), mlp_ratio=2
    )


def swin_v2(labels=LABELS):
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return _with_loose_biases(
        SwinTransformerV2(
            PIXELS, 2, num_classes=labels, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), mlp_ratio=2
        )
    )


def beit(labels=LABELS):
    from timm.models.beit import Beit

    return _with_loose_biases(Beit(PIXELS, 8, num_classes=labels, embed_dim=16, depth=2, num_heads=2, init_values=0.5))


def maxvit(labels=LABELS):
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    config = MaxxVitCfg(
        embed_dim=(8, 16),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=8,
        conv_cfg=MaxxVitConvCfg(expand_ratio=2.0),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=4, expand_ratio=2.0, window_size=(4, 4), rel_pos_type="mlp"),
    )
    return MaxxVit(config, img_size=PIXELS, num_classes=labels)


def tiny_vit(labels=LABELS):
    from timm.models.tiny_vit import TinyVit

    return TinyVit(
        num_classes=labels,
        embed_dims=(8, 8, 12, 16),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 3, 4),
        window_sizes=(2,) * 4,
    )


def hiera(labels=LABELS):
    from timm.models.hiera import Hiera

    return Hiera((PIXELS, PIXELS), num_classes=labels, embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), mlp_ratio=2)


def dla(labels=LABELS):
    """Classifies with a 1x1 convolution."""
    from timm.models.dla import DLA

    return DLA((1, 1, 1, 1, 1, 1), (4, 4, 8, 8, 8, 8), num_classes=labels)


def made(make, seed=0, **options):
    """Build a model whose statistics, scales and biases are not those that it starts with. In eval mode."""
    torch.manual_seed(seed)
    model = make(**options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(3 if parameter.std() < 0.05 else 1)
    return model.eval()


def images(count=5, seed=1):
    """Batches of unequal size, in the forms that loops give."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, PIXELS, PIXELS, generator=generator)
    return [(pixels[: count // 2], torch.zeros(count // 2)), {"pixel_values": pixels[count // 2 :], "labels": 1}]


def _with_loose_biases(model):
    for module in model.modules():
        if getattr(module, "q_bias", None) is not None:
            nn.init.normal_(module.q_bias, std=0.5)
            nn.init.normal_(module.v_bias, std=0.5)
    return model
