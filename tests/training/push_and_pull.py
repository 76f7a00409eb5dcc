"""Push a student to the hub that HF_ENDPOINT names, pull it back, say whether it is the same. Run by a test."""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification

from remos_hf import RelevantSlice
from tests.training.runs import trainer

if __name__ == "__main__":
    ours = trainer(sys.argv[1], slice_ratio=0.9, options={"hub_model_id": "me/student", "save_strategy": "no"})
    ours.train()
    pushed = ours.push_to_hub(language="en")
    pulled = AutoModelForSequenceClassification.from_pretrained("me/student")
    relevant = RelevantSlice.from_pretrained("me/student")
    pairs = zip(pulled.state_dict().values(), ours.model.state_dict().values(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    again = ours.push_to_hub(language="en")
    told = {"same_weights": same, "same_slice": relevant == ours.relevant_slice, "url": pushed.url}
    sys.stdout.write(json.dumps({**told, "sent_once": again.commit == pushed.commit}) + "\n")
