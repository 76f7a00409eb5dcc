"""Push a student to the hub that HF_ENDPOINT names, pull it back, say whether it is the same. Run by a test."""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification

from remos_hf import RelevantSlice
from tests.training.runs import trainer

# As the example scripts of transformers end.
SAID = {"finetuned_from": "owner/teacher", "tasks": "text-classification", "language": "en"}
SAID |= {"dataset_tags": "glue", "dataset_args": "sst2", "dataset": "GLUE SST2"}

if __name__ == "__main__":
    ours = trainer(sys.argv[1], slice_ratio=0.9, options={"hub_model_id": "me/student", "push_to_hub": True})
    ours.train()
    pushed = ours.push_to_hub(**SAID)
    pulled = AutoModelForSequenceClassification.from_pretrained("me/student")
    relevant = RelevantSlice.from_pretrained("me/student")
    pairs = zip(pulled.state_dict().values(), ours.model.state_dict().values(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    again = ours.push_to_hub(**SAID)
    told = {"same_weights": same, "same_slice": relevant == ours.relevant_slice, "url": pushed.url}
    sys.stdout.write(json.dumps({**told, "sent_once": again.commit == pushed.commit}) + "\n")
