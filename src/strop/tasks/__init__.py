"""Tasks: problems, prompts and reference answers."""

from .base import Task, build_task
from .render import Renderer

__all__ = ["Renderer", "Task", "build_task"]
