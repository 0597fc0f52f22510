import torch
from torch.utils.data import Dataset


class Ring(Dataset):
    def __init__(self, num=200):
        self.angle = torch.linspace(0, 6.28, num)

    def __len__(self):
        return len(self.angle)

    def __getitem__(self, index):
        return torch.stack([self.angle[index].cos(), self.angle[index].sin()])
