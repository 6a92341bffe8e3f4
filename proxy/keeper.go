package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"runtime"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
)

// A Keeper completes and pins the bytes of what is served although it is not the
// head: upstream may forget it, and a hold that cannot be pulled would be an
// error. Create it with NewKeeper; call Run, once.
type Keeper struct {
	contents *Contents
	kept     func(context.Context) iter.Seq2[audit.Tag, error]
	log      zerolog.Logger

	mu   sync.Mutex
	look map[audit.Ref]bool // refs whose hold has changed
	wake chan struct{}      // holds one
}

// NewKeeper returns a keeper of the refs that kept yields: those that are held,
// or deleted upstream. It starts nothing.
func NewKeeper(contents *Contents, kept func(context.Context) iter.Seq2[audit.Tag, error], log zerolog.Logger) *Keeper {
	return &Keeper{contents: contents, kept: kept, log: log, look: make(map[audit.Ref]bool), wake: make(chan struct{}, 1)}
}

// Recorded is told of an event. It pins what is served from then on, and does
// not wait for the rest.
func (k *Keeper) Recorded(e audit.Event) {
	switch e.Type {
	case audit.Held, audit.Violation, audit.Deleted:
	default:
		return
	}
	if e.Policy.Served != "" {
		k.contents.cache.Keep(e.Policy.Served, true)
	}
	k.mu.Lock()
	k.look[e.Ref] = true
	k.mu.Unlock()
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// keepRetry is how long what could not be completed waits for the next attempt.
const keepRetry = time.Minute

// Run completes what is held until ctx ends, and tries again what it could not.
func (k *Keeper) Run(ctx context.Context) error {
	for all := true; ; all = false {
		incomplete := k.round(ctx, all)
		var retry <-chan time.Time
		if incomplete {
			retry = time.After(keepRetry)
		}
		select {
		case <-k.wake:
		case <-retry:
		case <-ctx.Done():
			return nil
		}
	}
}

// round completes what was told of, or everything that is held, and tells
// whether something is left for another.
func (k *Keeper) round(ctx context.Context, all bool) (incomplete bool) {
	k.mu.Lock()
	look := k.look
	k.look = make(map[audit.Ref]bool)
	k.mu.Unlock()
	var tags []audit.Tag
	for t, err := range k.kept(ctx) {
		if err != nil {
			if ctx.Err() == nil {
				k.log.Error().Err(err).Msg("what is held is unknown, and may be incomplete")
			}
			return true
		}
		if t.State.Served != "" && (all || look[t.Ref]) {
			tags = append(tags, t)
		}
	}
	for _, t := range tags {
		err := k.complete(ctx, t)
		if err == nil || ctx.Err() != nil {
			continue
		}
		incomplete = true
		k.mu.Lock()
		k.look[t.Ref] = true
		k.mu.Unlock()
		line := k.log.Warn()
		if errors.Is(err, fs.ErrNotExist) {
			line = k.log.Error() // upstream has forgotten it: nobody will have it again
		}
		line.Err(err).Str("upstream", t.Ref.Upstream).Str("repo", t.Ref.Repository).Str("tag", t.Ref.Tag).
			Str("digest", t.State.Served.String()).Msg("what is held could not be completed; it is tried again")
	}
	return incomplete
}

// complete has all bytes of what t serves here, for the platforms that clients
// have pulled, or for this machine's if none was.
func (k *Keeper) complete(ctx context.Context, t audit.Tag) error {
	repo, err := k.contents.repository(t.Ref)
	if err != nil {
		return err
	}
	c := k.contents.cache
	c.Keep(t.State.Served, true)
	root, _, err := c.Manifest(ctx, t.State.Served, repo.manifest(t.State.Served))
	if err != nil {
		return err
	}
	images := []*cache.Manifest{root}
	if root.Index {
		if images, err = k.images(ctx, repo, root); err != nil {
			return err
		}
	}
	for _, m := range images {
		for _, r := range m.Refers {
			if err := c.Ensure(ctx, r.Digest, repo.blob(r.Digest)); err != nil {
				return fmt.Errorf("%s of %s: %w", r.Digest, m.Digest, err)
			}
		}
	}
	c.Keep(t.State.Served, true)
	return nil
}

// images are those of an index that clients have pulled: their manifests are
// here. If there is none, it is the one for this machine.
func (k *Keeper) images(ctx context.Context, repo repository, index *cache.Manifest) ([]*cache.Manifest, error) {
	var out []*cache.Manifest
	for _, r := range index.Refers {
		if _, here := k.contents.cache.Stat(r.Digest); !here {
			continue
		}
		m, _, err := k.contents.cache.Manifest(ctx, r.Digest, repo.manifest(r.Digest))
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	if len(out) > 0 {
		return out, nil
	}
	d, err := oci.Describe(index.Body)
	if err != nil {
		return nil, err
	}
	for _, r := range d.Refers {
		if r.Platform != "linux/"+runtime.GOARCH {
			continue
		}
		m, _, err := k.contents.cache.Manifest(ctx, r.Digest, repo.manifest(r.Digest))
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}
