"""axolotl's plugin that records a training for a test."""

from axolotl.integrations.base import BasePlugin
from stack_worker import Recorder


class RecorderPlugin(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        return [Recorder()]
