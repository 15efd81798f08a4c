"""A small run of FastNet on images made here, and its programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import cifar10_94
from tests.helpers.recipes import mesh_of
from train import data
from train.experiment import make_experiment
from train.fastnet import MIN_IMAGE_SIZE
from train.pipeline import make_pipeline
from train.programs import Programs
from train.recipe import check_config
from train.timing import Timer
from train.topology import Topology

CLASSES = 10
STEPS = 9  # one epoch of six, and half of one
TEST = 37  # no multiple of its batch


def examples(count, seed):
    """Images of 16x16 whose class shows in their colours."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    colour = np.random.default_rng(99).uniform(60, 200, (CLASSES, 1, 1, 3))
    noise = rng.normal(0, 30, (count, MIN_IMAGE_SIZE, MIN_IMAGE_SIZE, 3))
    images = np.clip(colour[labels] + noise, 0, 255).astype(np.uint8)
    return data.Split(images, labels)


DATASET = data.Dataset(examples(100, 0), examples(TEST, 1), CLASSES)


def small(argument="", *, widths=(8, 12), **changes):
    config = cifar10_94.get_config(argument)
    config.fastnet.widths = widths  # less to compile
    config.fastnet.whitening_bias_epochs = 1
    config.dtype = "float32"
    # The published rates are for the sum of the losses.
    config.learning_rate *= 16 / config.batch_size
    config.batch_size, config.test_batch_size = 16, 10
    config.epochs = 1.5
    config.lookahead_every = 3
    config.num_seeds = 1
    config.update(changes)
    return config


def experiment_of(config, devices=1, dataset=DATASET):
    check_config(config)
    return make_experiment(config, Topology(mesh_of(devices)), dataset)


class Run:
    """The programs of a config, and what they read."""

    def __init__(self, config, devices=1, dataset=DATASET):
        self.config = config
        self.experiment = experiment_of(config, devices, dataset)
        self.recipe = self.experiment.recipe
        self.pipeline = make_pipeline(config, dataset, self.experiment.topology)
        self.programs = Programs(self.experiment, self.pipeline)

    def train(self, seed=0, epochs=None):
        """Returns the states at the start and after epochs, and all Sums."""
        states, sums = [jax.device_get(self.programs.init()(seed))], []
        steps = self.experiment.steps
        for epoch in range(epochs or steps.epochs):
            state = jax.tree.map(jnp.copy, states[-1])
            state = self.experiment.topology.replicate(state)
            feeds = self.pipeline.train_feeds(
                seed=seed,
                epoch=epoch,
                start=0,
                stop=steps.of(epoch),
                timer=Timer(),
            )
            for size, feed in feeds:
                program = self.programs.train(size, self.recipe.phase(epoch))
                state, got = program(
                    state, feed, np.int32(seed), np.int32(epoch)
                )
                sums.append(jax.device_get(got))
            states.append(jax.device_get(state))
        return states, sums

    def test(self, state):
        """Returns the Sums over the test split."""
        variables = self.experiment.topology.replicate(state.variables)
        sums = [
            jax.device_get(self.programs.test(size)(variables, feed))
            for size, feed in self.pipeline.test_feeds()
        ]
        return jax.tree.map(lambda *each: sum(each), *sums)


def losses_of(sums):
    """Returns the mean loss of each dispatch."""
    return np.array([each.loss / each.count for each in sums])


@functools.cache
def plain_run():
    """The run of `small`, and its training, once for all tests of a file."""
    run = Run(small())
    return run, *run.train()
