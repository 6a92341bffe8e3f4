package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
)

// Taken is what Remove took out.
type Taken struct {
	Digests []digest.Digest
	Bytes   int64
	Kept    []digest.Digest // that others need, or that is pinned
}

// Remove takes an image out of the cache: of an index all of it or, with platforms,
// the images of those. Content that other tags need stays, and so does what is pinned;
// an image that is pinned itself is cache.ErrPinned. tags are all that are known.
func (c *Contents) Remove(ctx context.Context, root digest.Digest, platforms []string, tags iter.Seq2[audit.Tag, error]) (Taken, error) {
	var wanted []digest.Digest // the image first: without it nothing is torn
	seen := make(map[digest.Digest]bool)
	c.walk(ctx, root, platforms, func(d digest.Digest, _ bool) {
		if !seen[d] && (platforms == nil || d != root) {
			wanted = append(wanted, d)
		}
		seen[d] = true
	})
	if _, here := c.cache.Holds(root); !here {
		return Taken{}, fmt.Errorf("%s is not here: %w", root, fs.ErrNotExist)
	}
	needed, err := c.needed(ctx, root, platforms, tags)
	if err != nil {
		return Taken{}, err
	}
	var out Taken
	for _, d := range wanted {
		size, here := c.cache.Holds(d)
		if !here {
			continue
		}
		if needed[d] && d != root {
			out.Kept = append(out.Kept, d)
			continue
		}
		switch err := c.cache.Remove(d); {
		case err == nil:
			out.Digests, out.Bytes = append(out.Digests, d), out.Bytes+size
		case errors.Is(err, cache.ErrPinned) && d != root:
			out.Kept = append(out.Kept, d)
		case errors.Is(err, fs.ErrNotExist): // evicted meanwhile
		default:
			return out, err
		}
	}
	return out, nil
}

// needed is what known tags need, but for the one image.
func (c *Contents) needed(ctx context.Context, root digest.Digest, platforms []string, tags iter.Seq2[audit.Tag, error]) (map[digest.Digest]bool, error) {
	out := make(map[digest.Digest]bool)
	need := func(d digest.Digest, _ bool) { out[d] = true }
	for t, err := range tags {
		if err != nil {
			return nil, err
		}
		for _, d := range []digest.Digest{t.State.Head, t.State.Served} {
			if d != root && d != "" && !out[d] {
				c.walk(ctx, d, nil, need)
			}
		}
	}
	if platforms != nil {
		for _, r := range c.refers(ctx, root) {
			if r.Platform == "" || !oci.Wanted(platforms, r.Platform) {
				c.walk(ctx, r.Digest, nil, need)
			}
		}
	}
	return out, nil
}
