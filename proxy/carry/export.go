package carry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
	"tidemark/audit/bundle"
	"tidemark/proxy/oci"
)

// A Request says what is to be exported.
type Request struct {
	Refs      []audit.Ref // each once
	Platforms []string    // of indexes; nil for all
	Since     *Since      // nil for everything
}

// Since is what the receiver has already.
type Since struct {
	Bundle  digest.Digest   // the bundle that it has, "" if only the place in the log is known
	LogSize int64           // entries of the log as it was then
	Refs    []audit.Ref     // that are in the bundle
	Content []digest.Digest // that it has
}

// An UnfitError tells why images cannot be exported, or a bundle not be imported.
type UnfitError struct{ Problems []string }

func (e *UnfitError) Error() string { return strings.Join(e.Problems, "\n") }

// signedWait bounds how long an export waits for a checkpoint of what it exports.
const signedWait = 30 * time.Second

// Export writes a bundle of what refs mean to w: what clients are served, of the
// platforms that are wanted, with what refers to it, as far as that is here whole.
// Nobody is asked for anything. If it cannot, nothing is written: an UnfitError
// names every reason. The same state of log and cache gives the same bytes.
func (c *Carrier) Export(ctx context.Context, w io.Writer, q Request) (digest.Digest, error) {
	key := c.o.Signer.Key()
	if key == nil {
		return "", audit.ErrNoKey
	}
	signed, images, err := c.states(ctx, q.Refs)
	if err != nil {
		return "", err
	}
	e := bundle.Export{
		Checkpoint: signed.Note, VKey: key.VKey, Signer: key.Signer, Hashes: c.o.Store,
		Contents: bundle.Contents{Images: images},
		Open: func(_ context.Context, d digest.Digest) (io.ReadCloser, error) {
			f, err := c.o.Cache.OpenStored(d)
			if err != nil {
				return nil, err
			}
			return f, nil
		},
	}
	content, err := c.pack(ctx, q, &e.Contents)
	if err != nil {
		return "", err
	}
	release := c.hold(maps.Keys(content))
	defer release()
	from, err := c.base(ctx, q, &e.Contents, signed.Tree.N)
	if err != nil {
		return "", err
	}
	e.Events = func(ctx context.Context) iter.Seq2[audit.Entry, error] {
		return c.o.Store.EachEvent(ctx, from, signed.Tree.N)
	}
	return bundle.Write(ctx, w, e)
}

// states are what refs mean, at a checkpoint that covers it.
func (c *Carrier) states(ctx context.Context, refs []audit.Ref) (audit.Signed, []bundle.Image, error) {
	wait, cancel := context.WithTimeout(ctx, signedWait)
	defer cancel()
	for size := int64(0); ; {
		images, err := c.images(ctx, refs)
		if err != nil {
			return audit.Signed{}, nil, err
		}
		moved := false
		for _, im := range images {
			if im.Index >= size {
				size, moved = im.Index+1, true
			}
		}
		signed, err := c.o.Signer.Covering(wait, size)
		if err != nil {
			return audit.Signed{}, nil, err
		}
		if !moved { // since the checkpoint was there
			return signed, images, nil
		}
	}
}

func (c *Carrier) images(ctx context.Context, refs []audit.Ref) ([]bundle.Image, error) {
	var out []bundle.Image
	var unfit UnfitError
	for _, ref := range refs {
		st, err := c.o.Store.State(ctx, ref)
		if err != nil {
			return nil, err
		}
		last, err := c.o.Store.Events(ctx, audit.EventQuery{Ref: &ref, Descending: true, Limit: 1})
		if err != nil {
			return nil, err
		}
		served := c.o.Ledger.Tag(ref, st).Serves()
		stints, err := c.o.Store.History(ctx, ref, audit.HistoryQuery{})
		if err != nil {
			return nil, err
		}
		first := st.HeadSince
		if i := slices.IndexFunc(stints, func(st audit.Stint) bool { return st.Digest == served }); i >= 0 {
			first = stints[i].FirstSeen
		}
		switch {
		case !st.Known() || len(last) == 0:
			unfit.add("%s was never seen here: tidemark warm %s", ref, ref)
			continue
		case served == "":
			unfit.add("%s is not served by the policy", ref)
			continue
		}
		out = append(out, bundle.Image{
			Ref: ref.String(), Digest: served, MediaType: st.ServedMediaType, Size: st.ServedSize, Index: last[0].Index,
			FirstSeen: first, LastConfirmed: st.LastConfirmed,
		})
	}
	return out, unfit.orNil()
}

// pack lists the content of the images that are in list, and what refers to it.
func (c *Carrier) pack(ctx context.Context, q Request, list *bundle.Contents) (map[digest.Digest]int64, error) {
	all := newParcel()
	var unfit UnfitError
	for i := range list.Images {
		im := &list.Images[i]
		p, partial, err := c.gather(ctx, im.Digest, q.Platforms)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s: %w", im.Ref, err)
		case len(p.missing) > 0:
			unfit.missing(im, p)
			continue
		case q.Platforms != nil && partial != nil && len(partial) == 0:
			unfit.add("%s has no image for %s", im.Ref, strings.Join(q.Platforms, ", "))
			continue
		}
		if err := c.described(ctx, im); err != nil {
			return nil, err
		}
		slices.Sort(partial)
		im.Platforms = slices.Compact(partial)
		if err := c.referrers(ctx, im.Ref, p, list); err != nil {
			return nil, err
		}
		all.add(p)
	}
	if err := unfit.orNil(); err != nil {
		return nil, err
	}
	for d := range all.manifests {
		delete(all.blobs, d)
	}
	list.Manifests, list.Blobs = listed(all.manifests), listed(all.blobs)
	maps.Copy(all.manifests, all.blobs)
	return all.manifests, nil
}

// described fills in what an older state does not tell of an image.
func (c *Carrier) described(ctx context.Context, im *bundle.Image) error {
	body, err := c.o.Cache.Read(ctx, im.Digest, nil, oci.MaxManifest)
	if err != nil {
		return err
	}
	d, err := oci.Describe(body)
	im.MediaType, im.Size = d.MediaType, int64(len(body))
	return err
}

// referrers adds to a parcel what refers to the manifests in it, and to those, if it
// is here whole.
func (c *Carrier) referrers(ctx context.Context, ref string, p *parcel, list *bundle.Contents) error {
	r, err := audit.ParseRef(ref)
	if err != nil {
		return err
	}
	repository := r.Upstream + "/" + r.Repository
	known := func(d digest.Digest) bool {
		return slices.ContainsFunc(list.Referrers, func(r bundle.Referrer) bool {
			return r.Repository == repository && r.Descriptor.Digest == d
		})
	}
	for todo := slices.Sorted(maps.Keys(p.manifests)); len(todo) > 0; todo = todo[1:] {
		found, err := c.o.Store.Referrers(ctx, r.Upstream, r.Repository, todo[0])
		if err != nil {
			return err
		}
		for _, f := range found {
			about := newParcel()
			if err := c.whole(ctx, about, f.Digest, -1); err != nil || len(about.missing) > 0 {
				continue // it is no use without its content
			}
			descriptor, ok := c.referring(ctx, f)
			if !ok {
				continue
			}
			if !known(f.Digest) {
				list.Referrers = append(list.Referrers, bundle.Referrer{Repository: repository, Subject: f.Subject, Descriptor: descriptor})
			}
			if _, had := p.manifests[f.Digest]; !had {
				todo = append(todo, f.Digest)
			}
			p.add(about)
		}
	}
	return nil
}

// referring is the descriptor of a referrer, if its manifest says the same of itself.
func (c *Carrier) referring(ctx context.Context, f audit.Referrer) (ocispec.Descriptor, bool) {
	body, err := c.o.Cache.Read(ctx, f.Digest, nil, oci.MaxManifest)
	if err != nil {
		return ocispec.Descriptor{}, false
	}
	subject, own, ok := oci.Referring(body)
	if !ok || subject != f.Subject {
		return own, false
	}
	var told ocispec.Descriptor
	if json.Unmarshal(f.Descriptor, &told) == nil && told.Digest == own.Digest && told.Size == own.Size && told.MediaType == own.MediaType {
		return told, true // as upstream lists it
	}
	return own, true
}

// base leaves out what the receiver has, and says from where on events are needed.
func (c *Carrier) base(ctx context.Context, q Request, list *bundle.Contents, size int64) (map[audit.Ref]int64, error) {
	from := make(map[audit.Ref]int64)
	for _, ref := range q.Refs {
		from[ref] = 0
	}
	if q.Since == nil {
		return from, nil
	}
	if q.Since.LogSize > size {
		return nil, &UnfitError{[]string{fmt.Sprintf("the base is of %d entries of the log, which has %d: it is of another log, or the log was rolled back", q.Since.LogSize, size)}}
	}
	list.Base = &bundle.Base{Bundle: q.Since.Bundle, LogSize: q.Since.LogSize}
	had := make(map[digest.Digest]bool)
	for _, d := range q.Since.Content {
		had[d] = true
	}
	known := q.Since.Refs
	if q.Since.Bundle == "" {
		known = q.Refs
		if err := c.hadAt(ctx, q, had); err != nil {
			return nil, err
		}
	}
	for _, ref := range known {
		if _, wanted := from[ref]; wanted {
			from[ref] = q.Since.LogSize
		}
	}
	omit := func(blobs []bundle.Blob) []bundle.Blob {
		return slices.DeleteFunc(blobs, func(b bundle.Blob) bool {
			if had[b.Digest] {
				list.Omitted = append(list.Omitted, b)
			}
			return had[b.Digest]
		})
	}
	list.Manifests, list.Blobs = omit(list.Manifests), omit(list.Blobs)
	return from, nil
}

// hadAt finds what the receiver has who was told what the refs meant at a place in
// the log.
func (c *Carrier) hadAt(ctx context.Context, q Request, had map[digest.Digest]bool) error {
	if q.Since.LogSize == 0 {
		return nil
	}
	for _, ref := range q.Refs {
		chronicle, err := c.o.Store.Chronicle(ctx, ref)
		if err != nil {
			return err
		}
		then, err := chronicle.AsOf(audit.AtIndex(q.Since.LogSize-1), time.Now())
		var past *audit.PastError
		if errors.As(err, &past) {
			continue // nothing was served then
		}
		if err != nil {
			return err
		}
		p, _, err := c.gather(ctx, then.Digest, q.Platforms)
		if err != nil {
			return err
		}
		for _, content := range []map[digest.Digest]int64{p.manifests, p.blobs} {
			for d := range content {
				had[d] = true
			}
		}
	}
	return nil
}

func listed(content map[digest.Digest]int64) []bundle.Blob {
	out := make([]bundle.Blob, 0, len(content))
	for d, size := range content {
		out = append(out, bundle.Blob{Digest: d, Size: size})
	}
	return out
}

func (e *UnfitError) add(format string, args ...any) {
	e.Problems = append(e.Problems, fmt.Sprintf(format, args...))
}

func (e *UnfitError) orNil() error {
	if len(e.Problems) == 0 {
		return nil
	}
	return e
}

// missing tells what of an image is not here, and how it gets here.
func (e *UnfitError) missing(im *bundle.Image, p *parcel) {
	size, unknown := int64(0), ""
	for _, m := range p.missing {
		if m.Size < 0 {
			unknown = "at least "
		}
		size += max(0, m.Size)
	}
	e.add("%s is not complete here: %d pieces of %s%d bytes are missing, the first is %s; tidemark warm %s fetches them, --platform leaves out those of other platforms",
		im.Ref, len(p.missing), unknown, size, p.missing[0].Digest, im.Ref)
}
