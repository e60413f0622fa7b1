"""Registries of the scope ``visionssm``: children of MMEngine's, filled from :mod:`visionssm.openmmlab`.

MMEngine imports this module by itself when a config names the scope (``default_scope = 'visionssm'`` or
``type='visionssm.ImageClassifier'``), so configs need no ``custom_imports``.
"""
from mmengine import registry as root
from mmengine.registry import Registry

SCOPE = 'visionssm'
LOCATIONS = ['visionssm.openmmlab']


def _child(parent: Registry) -> Registry:
    return Registry(parent.name, parent=parent, scope=SCOPE, locations=LOCATIONS)


DATA_SAMPLERS = _child(root.DATA_SAMPLERS)
DATASETS = _child(root.DATASETS)
EVALUATOR = _child(root.EVALUATOR)
FUNCTIONS = _child(root.FUNCTIONS)
HOOKS = _child(root.HOOKS)
LOG_PROCESSORS = _child(root.LOG_PROCESSORS)
LOOPS = _child(root.LOOPS)
METRICS = _child(root.METRICS)
MODELS = _child(root.MODELS)
MODEL_WRAPPERS = _child(root.MODEL_WRAPPERS)
OPTIM_WRAPPER_CONSTRUCTORS = _child(root.OPTIM_WRAPPER_CONSTRUCTORS)
OPTIM_WRAPPERS = _child(root.OPTIM_WRAPPERS)
OPTIMIZERS = _child(root.OPTIMIZERS)
PARAM_SCHEDULERS = _child(root.PARAM_SCHEDULERS)
RUNNERS = _child(root.RUNNERS)
TASK_UTILS = _child(root.TASK_UTILS)
TRANSFORMS = _child(root.TRANSFORMS)
VISBACKENDS = _child(root.VISBACKENDS)
VISUALIZERS = _child(root.VISUALIZERS)
