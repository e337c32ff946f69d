"""Drafts in the form that serving engines load."""

from eagle_rpc.serving.export import ExportedDraft, export_draft, load_export

__all__ = ["ExportedDraft", "export_draft", "load_export"]
