"""GGUF files as the tests write them, with the gguf package."""

from __future__ import annotations

from collections.abc import Collection

from gguf import GGUFReader, GGUFValueType, GGUFWriter


def copy_metadata(reader: GGUFReader, writer: GGUFWriter, leaving: Collection[str] = ()) -> None:
    """Add every key of a file but its architecture, which a writer is made with, and those that are left out."""
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *leaving):
            part = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=part)


def copy_tensors(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Add every tensor of a file as it is."""
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)


def finish(writer: GGUFWriter) -> None:
    """Write what was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
