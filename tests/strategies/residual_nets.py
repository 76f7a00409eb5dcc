"""Tiny residual nets with batch norms: the sum before a ReLU (ResNet), and norms first (WideResNet)."""

import torch
from torch import nn


class Post(nn.Module):
    def __init__(self, narrow, wide, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.downsample = None
        if narrow != wide:
            self.downsample = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        added = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(added + (x if self.downsample is None else self.downsample(x)))


class Pre(nn.Module):
    def __init__(self, narrow, wide, stride=1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(narrow), nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(wide), nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(narrow, wide, 1, stride, bias=False) if narrow != wide else None

    def forward(self, x):
        first = torch.relu(self.bn1(x))
        added = self.conv2(torch.relu(self.bn2(self.conv1(first))))
        return added + (x if self.shortcut is None else self.shortcut(first))


class Net(nn.Module):
    """A stem, four blocks in two stages, a final norm if blocks have theirs first, a head."""

    def __init__(self, block=Post, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(block(6, 6), block(6, 6))
        self.layer2 = nn.Sequential(block(6, 8, 2), block(8, 8))
        if block is Pre:
            self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        for norm in (one for one in self.modules() if isinstance(one, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, pixel_values):
        maps = self.layer2(self.layer1(self.stem(pixel_values)))
        return self.head((torch.relu(self.norm(maps)) if hasattr(self, "norm") else maps).mean((2, 3)))
