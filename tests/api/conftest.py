from tests.trainer.conftest import cache_folder, t5_config

__all__ = ["cache_folder", "t5_config"]
