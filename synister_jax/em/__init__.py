# SPDX-License-Identifier: Apache-2.0
"""The electron-microscopy volume: opened, described, read crop by crop."""
