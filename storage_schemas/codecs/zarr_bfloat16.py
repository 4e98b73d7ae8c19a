"""bfloat16 for zarr-python: a data type plug-in over ml_dtypes. Importing this module registers it.

Written as the core name "bfloat16", which tensorstore reads bit for bit. The package also declares an entry point of
the group `zarr.data_type`, but zarr-python (3.1.0 to 3.1.6) collects that group and never loads it: without the import
it answers "No Zarr data type found that matches 'bfloat16'". Nothing here imports torch.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.core.dtype.wrapper import ZDType

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """The Zarr v3 data type "bfloat16". It has endianness, so that the bytes codec records it."""

    dtype_cls: ClassVar[type] = type(_NATIVE)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:
        """From ml_dtypes.bfloat16; DataTypeValidationError for any other."""
        if dtype != _NATIVE:
            raise DataTypeValidationError(f"dtype is {dtype}, expected bfloat16")
        return cls()

    def to_native_dtype(self) -> np.dtype:
        """ml_dtypes.bfloat16."""
        return _NATIVE

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 exists in Zarr v3 only")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"data type is {data!r}, expected 'bfloat16'")
        return cls()

    def to_json(self, zarr_format: int) -> Any:
        """The name in zarr.json."""
        if zarr_format != 3:
            raise ValueError(f"zarr format is {zarr_format}, bfloat16 needs 3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (int, float, np.floating, np.integer, ml_dtypes.bfloat16))

    def cast_scalar(self, data: object) -> Any:
        """A bfloat16 scalar from a number."""
        if not self._check_scalar(data):
            raise TypeError(f"{data!r} is not a number")
        return ml_dtypes.bfloat16(data)

    def default_scalar(self) -> Any:
        """Zero."""
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        """The fill value of zarr.json: a number, or "NaN", "Infinity", "-Infinity"."""
        return ml_dtypes.bfloat16(float(data))

    def to_json_scalar(self, data: object, *, zarr_format: int) -> Any:
        """The fill value for zarr.json."""
        value = float(data)  # type: ignore[arg-type]  # zarr hands over what cast_scalar made
        names = {float("inf"): "Infinity", float("-inf"): "-Infinity"}
        return "NaN" if value != value else names.get(value, value)


data_type_registry.register("bfloat16", BFloat16)
