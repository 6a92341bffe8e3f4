package audit

import (
	"context"
	"fmt"
	"io/fs"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit/taglog"
)

// Leaves reads the entries of a log.
type Leaves interface {
	// Leaves returns n leaves from start on, all of them or fs.ErrNotExist.
	Leaves(ctx context.Context, start, n int64) ([][]byte, error)
}

// Tiles shows a log as c2sp.org/tlog-tiles lays it out. It is what the admin
// address serves and what a verification of a data folder reads.
type Tiles struct {
	Hashes tlog.HashReader
	Leaves Leaves
}

var _ torchwood.TileReader = Tiles{}

// Tile returns the bytes of a tile of hashes, or of a bundle of entries (L is -1).
func (t Tiles) Tile(ctx context.Context, tile tlog.Tile) ([]byte, error) {
	if tile.L >= 0 {
		return taglog.Tile(tile, t.Hashes)
	}
	leaves, err := t.Leaves.Leaves(ctx, tile.N*torchwood.TileWidth, int64(tile.W))
	if err != nil {
		return nil, err
	}
	return taglog.Entries(leaves)
}

// ReadTiles implements torchwood.TileReader.
func (t Tiles) ReadTiles(ctx context.Context, tiles []tlog.Tile) ([][]byte, error) {
	out := make([][]byte, len(tiles))
	for i, tile := range tiles {
		var err error
		if out[i], err = t.Tile(ctx, tile); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// SaveTiles implements torchwood.TileReader. There is nothing to save.
func (Tiles) SaveTiles([]tlog.Tile, [][]byte) {}

// ReadEndpoint implements torchwood.TileReader: a log on disk has none.
func (Tiles) ReadEndpoint(_ context.Context, path string) ([]byte, error) {
	return nil, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
}
