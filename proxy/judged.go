package proxy

import (
	"context"
	"slices"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
	"tidemark/audit/diff"
	"tidemark/cache"
	"tidemark/proxy/oci"
)

// What a move is judged by that the two manifests alone do not tell.

// consumes tells whether the platforms that changed from old are among those that are
// here because clients had them, as a signal, or "" when nobody had any
// (AUDIT.md, R8).
func (r *reader) consumes(old digest.Digest, d *diff.Diff) string {
	some := false
	for _, o := range r.children(old) {
		if _, here := r.cache.Stat(o.Digest); !here || o.Platform == "" {
			continue
		}
		some = true
		changed := slices.ContainsFunc(d.Changed, func(p diff.PlatformDiff) bool { return p.Old == o.Digest })
		if changed || slices.Contains(d.Platforms.Removed, diff.Canonical(o.Platform)) {
			return "consumed_platform_changed"
		}
	}
	if !some {
		return ""
	}
	return audit.Unconsumed
}

// baseHeads is how many of the latest meanings of a base image are looked at.
const baseHeads = 4

// base is the image that d only took over a new version of: the images name it, their
// own steps are the same, and the layers below these are those of a digest that the
// ledger saw it move to. It is zero when one of that is not so.
func (c *Contents) base(ctx context.Context, d *diff.Diff) (none audit.Ref) {
	if d.Class != diff.Rebuild || c.history == nil || slices.ContainsFunc(d.Changed, func(p diff.PlatformDiff) bool { return p.Config == nil || !p.Config.BaseOnly }) {
		return none
	}
	_, name := d.Says(ocispec.AnnotationBaseImageName)
	named, err := reference.ParseDockerRef(name)
	tagged, ok := named.(reference.Tagged)
	if err != nil || !ok {
		return none
	}
	ref := audit.Ref{Upstream: reference.Domain(named), Repository: reference.Path(named), Tag: tagged.Tag()}
	repo, err := c.repository(ref)
	if err != nil {
		return none
	}
	stints, err := c.history(ctx, ref, audit.HistoryQuery{Limit: baseHeads})
	if err != nil {
		return none
	}
	for i := 0; i+1 < len(stints); i++ { // what it meant first is no move
		if repo.under(ctx, stints[i].Digest, d) {
			return ref
		}
	}
	return none
}

// under tells whether the images that are new in d are on top of those of a digest of
// the repository.
func (r repository) under(ctx context.Context, dgst digest.Digest, d *diff.Diff) bool {
	rd := &reader{ctx: ctx, repo: r, cache: r.cache, sources: map[digest.Digest]cache.Source{dgst: r.manifest(dgst)}}
	platforms := rd.children(dgst)
	for _, p := range d.Changed {
		image := dgst
		if platforms != nil {
			i := slices.IndexFunc(platforms, func(o oci.Descriptor) bool { return diff.Canonical(o.Platform) == p.Platform })
			if i < 0 {
				return false
			}
			image = platforms[i].Digest
			rd.sources[image] = r.manifest(image)
		}
		if !onTop(rd.layers(image), p.Layers) {
			return false
		}
	}
	return true
}

// layers are the layers of an image, or nothing.
func (r *reader) layers(image digest.Digest) (out []digest.Digest) {
	body, err := r.read(image)
	if err != nil {
		return nil
	}
	m, err := oci.Describe(body)
	if err != nil || m.Index || len(m.Refers) == 0 {
		return nil
	}
	for _, l := range m.Refers[1:] { // the first is the configuration
		out = append(out, l.Digest)
	}
	return out
}

// onTop tells whether the new image of l begins with the layers of a base that is
// another than before.
func onTop(base []digest.Digest, l *diff.Layers) bool {
	image := make(map[int]digest.Digest)
	for _, list := range [][]diff.Layer{l.Shared, l.Added} {
		for _, layer := range list {
			image[layer.Index] = layer.Digest
		}
	}
	for i, d := range base {
		if image[i] != d {
			return false
		}
	}
	return len(base) > 0 && l.FirstDiffers < len(base)
}
