"""transformers' common tests on Megalodon's classes, as a model contributed upstream has them, and on Mamba2's.

tests/model/test_transformers_mixins.py runs this file in a process of its own, with `upstream_tests.PACKAGE` on the
path. The hub is not needed. mypy and default test runs do not see the file: without that package it cannot be imported.
"""

from __future__ import annotations

import inspect
import unittest
import unittest.mock
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, Mamba2Model
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM, MegalodonModel

# The suite asks these tables what a class is for; a model that lies upstream is in them.
modeling_auto.MODEL_MAPPING_NAMES["megalodon"] = "MegalodonModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["megalodon"] = "MegalodonForCausalLM"


class ModelTester:
    """A small config, and a batch whose length is not a multiple of the chunk."""

    is_training = True
    batch_size, seq_length, vocab_size, hidden_size, num_hidden_layers = 3, 7, 99, 32, 2
    base_model_class: Any
    causal_lm_class: Any

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.common = {
            **{"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "num_hidden_layers": 2},
            **{f"{name}_token_id": self.vocab_size - 1 for name in ("bos", "eos", "pad")},
        }

    def get_config(self) -> Any:
        raise NotImplementedError

    def prepare_config_and_inputs(self) -> tuple[Any, ...]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(input_ids)
        mask[0, :2] = 0
        labels = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), input_ids.to(torch_device), mask.to(torch_device), labels.to(torch_device)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config, input_ids, mask, _ = self.prepare_config_and_inputs()
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(mask)}


class MegalodonTester(ModelTester):
    base_model_class, causal_lm_class = MegalodonModel, MegalodonForCausalLM
    num_attention_heads, intermediate_size = 2, 40

    def get_config(self) -> MegalodonConfig:
        return MegalodonConfig(
            **self.common, num_attention_heads=2, intermediate_size=40, z_dim=16, value_dim=32, cema_ndim=4,
            chunk_size=4, norm_num_groups=4, share_emb=True,
        )  # fmt: skip


class Mamba2Tester(ModelTester):
    base_model_class, causal_lm_class = Mamba2Model, Mamba2ForCausalLM

    def get_config(self) -> Mamba2Config:
        sizes = {"num_heads": 8, "n_groups": 8, "state_size": 2, "head_dim": 8, "conv_kernel": 4, "chunk_size": 8}
        return Mamba2Config(**self.common, **sizes)


class Mamba2Test(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """The tests that Mamba2 runs: Megalodon has to run as many."""

    all_model_classes = (Mamba2Model, Mamba2ForCausalLM)
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester: ModelTester = Mamba2Tester(self)
        self.config_tester = ConfigTester(self, config_class=Mamba2Config, common_properties=["hidden_size"])

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class MegalodonTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (MegalodonModel, MegalodonForCausalLM)
    has_attentions = False  # as the recurrent models upstream say of themselves

    def setUp(self) -> None:
        self.model_tester: ModelTester = MegalodonTester(self)
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
        self.config_tester = ConfigTester(self, config_class=MegalodonConfig, common_properties=names, model_dim=32)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self) -> None:
        # It skips models whose config's file does not begin with a recent year of copyright, as Mamba2's does.
        recent = inspect.getfile(Mamba2Config)
        with unittest.mock.patch.object(inspect, "getfile", return_value=recent):
            super().test_can_init_all_missing_weights()

    # The cache is one ring of a chunk's keys and values, an EMA state and norm statistics a layer: its own layout.

    def _check_past_key_values_for_generate(self, batch_size: int, cache: Any, seq_length: int, config: Any) -> None:
        assert cache.batch_size == batch_size
        assert cache.get_seq_length() == seq_length
        assert {tensor.shape[0] for tensor in cache.tensors()} == {batch_size}

    def _check_caches_are_equal(self, one: Any, other: Any) -> None:
        assert type(one) is type(other)
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(a, b)

    # The mixin for generation has the first of these for models with attentions, and it is promised here.

    def test_left_padding(self) -> None:
        config, input_ids, mask, _ = self.model_tester.prepare_config_and_inputs()
        model = MegalodonForCausalLM(config).to(torch_device).eval()
        with torch.no_grad():
            padded = model(input_ids[:1], attention_mask=mask[:1]).logits[:, 2:]
            torch.testing.assert_close(padded, model(input_ids[:1, 2:]).logits, atol=1e-5, rtol=1e-5)

    def test_pieces_give_the_whole(self) -> None:
        config, input_ids, mask, _ = self.model_tester.prepare_config_and_inputs()
        for model_class in self.all_model_classes:
            model = model_class(config).to(torch_device).eval()
            with torch.no_grad():
                whole = model(input_ids, attention_mask=mask)[0]
                out = model(input_ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
                cache = out.get("cache", out.get("past_key_values"))
                parts = [out[0]]
                for i in range(4, input_ids.shape[1]):
                    parts.append(model(input_ids[:, i : i + 1], past_key_values=cache)[0])
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
