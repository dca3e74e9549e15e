"""tinker-cookbook's DPO with the flags of its recipe, on comparisons made here: no download."""

from __future__ import annotations

import chz
import datasets
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.recipes.preference.dpo import train
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig


@chz.chz
class Colours(ComparisonDatasetBuilder):
    def get_train_and_test_datasets(self):
        words = ["red", "blue", "green", "black"] * 4
        return datasets.Dataset.from_list([{"word": word} for word in words]), None

    def example_to_labeled_comparison(self, example):
        def says(text):
            return [{"role": "assistant", "content": text}]

        prompt = [{"role": "user", "content": f"Say {example['word']}."}]
        comparison = Comparison(
            prompt_conversation=prompt,
            completion_A=says(example["word"]),
            completion_B=says("no"),
        )
        return LabeledComparison(comparison=comparison, label="A")


def builder(dataset, model_name, renderer_name, max_length, batch_size):
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model_name, renderer_name=renderer_name, max_length=200,
        batch_size=batch_size,
    )  # fmt: skip
    return DPODatasetBuilderFromComparisons(common_config=common, comparison_builder=Colours())


if __name__ == "__main__":
    assert train_dpo is train.train_dpo
    train.get_dataset_builder = builder
    train.cli_main(chz.entrypoint(train.CLIConfig))
