"""transformers' common tests on Megalodon's classes, as a model contributed upstream has them, and on Mamba2's.

tests/model/test_transformers_mixins.py runs this file in a process of its own, with `upstream_tests.PACKAGE` on the
path. The hub is not needed. mypy and default test runs do not see the file: without that package it cannot be imported.
"""

from __future__ import annotations

import inspect
import os
import string
import unittest
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Mamba2Config, Mamba2ForCausalLM, Mamba2Model, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM, MegalodonModel

# The suite asks these tables what a class is for; a model that lies upstream is in them.
modeling_auto.MODEL_MAPPING_NAMES["megalodon"] = "MegalodonModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["megalodon"] = "MegalodonForCausalLM"
TINY = Path(os.environ["TRANSFORMERS_TINY_MODEL_PATH"])  # where the mixin for pipelines looks for models


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    """A token for each printable character."""
    tokens = ["<unk>", "<s>", *string.printable[:95]]
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", pad_token="<unk>", model_input_names=names
    )


class ModelTester:
    """A small config, and a batch whose length is not a multiple of the chunk."""

    is_training = True
    batch_size, seq_length, vocab_size, hidden_size, num_hidden_layers = 3, 7, 99, 32, 2
    base_model_class: Any
    causal_lm_class: Any
    get_config: Callable[[ModelTester], Any]

    def __init__(self, parent: unittest.TestCase | None = None) -> None:
        self.parent = parent
        self.common = {
            **{"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "num_hidden_layers": 2},
            **{f"{name}_token_id": self.vocab_size - 1 for name in ("bos", "eos", "pad")},
        }

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


class CommonTests(ModelTesterMixin, TrainingTesterMixin, PipelineTesterMixin):
    """What both models run."""

    has_attentions = False  # as the recurrent models upstream say of themselves
    tester_class: type[ModelTester]
    config_names: tuple[str, ...] = ("hidden_size", "num_hidden_layers", "vocab_size")
    config_values: ClassVar[dict[str, int]]  # one that is not the default

    @classmethod
    def setUpClass(cls) -> None:
        tester = cls.tester_class
        cls.all_model_classes = (tester.base_model_class, tester.causal_lm_class)
        cls.pipeline_model_mapping = {
            "feature-extraction": tester.base_model_class, "text-generation": tester.causal_lm_class
        }  # fmt: skip
        for model_class in cls.all_model_classes:
            config = tester().get_config()
            folder = TINY / config.model_type / model_class.__name__
            model_class(config).save_pretrained(folder)
            tokenizer_of_characters().save_pretrained(folder)

    def setUp(self) -> None:
        self.model_tester = self.tester_class(self)
        config_class = type(self.model_tester.get_config())
        names = list(self.config_names)
        self.config_tester = ConfigTester(self, config_class, common_properties=names, **self.config_values)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def run_pipeline_test(self, task: str, *args: Any, **kwargs: Any) -> None:
        # Without torchvision, the test for features cannot look up whether the model is one for images.
        table = "tests.pipelines.test_pipelines_feature_extraction.IMAGE_PROCESSOR_MAPPING"
        with unittest.mock.patch(table, {}):
            super().run_pipeline_test(task, *args, **kwargs)


class Mamba2Test(CommonTests, GenerationTesterMixin, unittest.TestCase):
    """The tests that Mamba2 runs: Megalodon has to run as many."""

    tester_class = Mamba2Tester
    config_values: ClassVar[dict[str, int]] = {"n_groups": 4}

    # The shapes of its states, for the mixin for generation.

    def _get_conv_state_shape(self, batch_size: int, config: Any) -> tuple[int, ...]:
        channels = config.expand * config.hidden_size + 2 * config.n_groups * config.state_size
        return batch_size, channels, config.conv_kernel

    def _get_recurrent_state_shape(self, batch_size: int, config: Any) -> tuple[int, ...]:
        return batch_size, config.num_heads, config.head_dim, config.state_size


class GenerationTests(GenerationTesterMixin):
    """The mixin for generation, which leaves two tests out for reasons that do not hold here."""

    def test_left_padding_compatibility(self) -> None:
        # It runs for models with attentions alone; what it asks for is promised here.
        with unittest.mock.patch.object(type(self), "has_attentions", True):
            super().test_left_padding_compatibility()

    def test_recurrent_layers_mask_padding_on_continued_forward(self) -> None:
        # It runs for models whose config lists such layers.
        prepare = self.model_tester.prepare_config_and_inputs_for_common

        def with_layer_types() -> tuple[Any, dict[str, Any]]:
            config, inputs = prepare()
            config.layer_types = ["hybrid"] * config.num_hidden_layers
            return config, inputs

        with unittest.mock.patch.object(self.model_tester, "prepare_config_and_inputs_for_common", with_layer_types):
            super().test_recurrent_layers_mask_padding_on_continued_forward()


HAS_GENERATION = hasattr(GenerationTesterMixin, "test_greedy_generate")


class MegalodonTest(CommonTests, GenerationTests if HAS_GENERATION else GenerationTesterMixin, unittest.TestCase):
    tester_class = MegalodonTester
    config_values: ClassVar[dict[str, int]] = {"model_dim": 32}
    config_names = (*CommonTests.config_names, "num_attention_heads")

    def test_can_init_all_missing_weights(self) -> None:
        # It skips models whose config's file does not begin with a recent year of copyright, as Mamba2's does.
        recent = inspect.getfile(Mamba2Config)
        with unittest.mock.patch.object(inspect, "getfile", return_value=recent):
            super().test_can_init_all_missing_weights()

    # The cache is one ring of a chunk's keys and values, an EMA state and norm statistics a layer: its own layout.

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        assert past_key_values.batch_size == batch_size
        assert past_key_values.get_seq_length() == seq_length
        assert {tensor.shape[0] for tensor in past_key_values.tensors()} == {batch_size}

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
