"""Pull a student from the hub that HF_ENDPOINT names, first without remos_hf. Run by a test."""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification

if __name__ == "__main__":
    student = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
    ours = any(name.startswith("remos_hf") for name in sys.modules)
    with torch.no_grad():
        logits = student(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()
    from remos_hf import RelevantSlice
    from remos_hf.sharing.record import Sidecars

    same = Sidecars.from_pretrained(sys.argv[1]).relevant_slice == RelevantSlice.from_pretrained(sys.argv[1])
    sys.stdout.write(json.dumps({"logits": logits, "needed_ours": ours, "same_slice": same}) + "\n")
