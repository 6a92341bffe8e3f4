package carry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/note"

	"tidemark/audit"
	"tidemark/audit/bundle"
	"tidemark/cache"
)

// Imported is what became of a bundle.
type Imported struct {
	Bundle  digest.Digest
	Origin  string
	LogSize int64
	Already bool // it had been imported before: its content is here again, the ledger has not changed
	Refs    []ImportedRef
}

// An ImportedRef is a ref of a bundle, and what became of it: see audit.CarriedNew.
type ImportedRef struct {
	Ref    string
	Digest digest.Digest
	Became string
}

// An UntrustedError reports a bundle that is signed by a key that nobody has said is
// trusted.
type UntrustedError struct{ VKey, Known string }

func (e *UntrustedError) Error() string {
	if e.Known != "" {
		return fmt.Sprintf("it is signed by the key %s, and %s is trusted", e.VKey, e.Known)
	}
	return fmt.Sprintf("it is signed by the key %s, which is not trusted here; if that is the key of the log that it should come from (tidemark prints it at /log/vkey there), import it with --trust and that key", e.VKey)
}

// Import takes in a bundle: content first, then what the log says of it. Everything
// is verified before anything becomes visible; then the content does, and after that
// the ledger tells of it in one transaction. trust is a verifier that the bundle must
// be signed by, or "" for the one by which its log was imported before.
//
// It can be called again with the same bundle whatever became of the call before:
// content that arrived is not written again, and what the ledger has taken in it does
// not take in twice. A bundle that is not what it should be is a bundle.WrongError,
// one of another key an UntrustedError, and one that does not fit to what is here an
// UnfitError.
func (c *Carrier) Import(ctx context.Context, r io.Reader, trust string) (Imported, error) {
	in := &importing{c: c, histories: make(map[audit.Ref]*audit.History)}
	defer in.close()
	list, err := bundle.Read(ctx, r, bundle.Checks{
		Verifier: func(vkey string) (note.Verifier, error) { return in.verifier(ctx, vkey, trust) },
		Describe: Describe, Event: in.event,
		Begin: func(list bundle.Contents) error { return in.begin(ctx, list) },
		Content: func(ctx context.Context, b bundle.Blob, r io.Reader) error {
			return in.intake.Put(ctx, b.Digest, b.Size, r)
		},
	})
	if err != nil {
		if wrong := (*bundle.WrongError)(nil); errors.As(err, &wrong) && in.intake != nil {
			return Imported{}, errors.Join(err, in.intake.Discard())
		}
		return Imported{}, err
	}
	if err := in.intake.Publish(ctx); err != nil {
		return Imported{}, fmt.Errorf("make the content visible: %w", err)
	}
	cargo, err := in.cargo(ctx, list)
	if err != nil {
		return Imported{}, err
	}
	out := Imported{Bundle: cargo.Bundle, Origin: cargo.Origin, LogSize: cargo.LogSize}
	became, err := c.o.Ledger.Import(ctx, c.o.Store, cargo)
	if out.Already = errors.Is(err, audit.ErrImportedAlready); err != nil && !out.Already {
		return Imported{}, err
	}
	for _, ref := range cargo.Refs {
		what := became[ref.Ref]
		if out.Already {
			st, err := c.o.Store.State(ctx, ref.Ref)
			if err != nil {
				return Imported{}, err
			}
			switch ref.Digest {
			case st.Served:
				what = audit.CarriedSame
			case st.Head:
				what = audit.CarriedHeld
			default:
				what = audit.CarriedOlder
			}
		}
		out.Refs = append(out.Refs, ImportedRef{ref.Ref.String(), ref.Digest, what})
	}
	return out, nil
}

// An importing is one call of Import.
type importing struct {
	c         *Carrier
	vkey      string
	intake    *cache.Intake
	histories map[audit.Ref]*audit.History
}

// verifier returns the trusted key that vkey must be.
func (in *importing) verifier(ctx context.Context, vkey, trust string) (note.Verifier, error) {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, err
	}
	if trust == "" {
		if trust, err = in.c.o.Store.TrustedKey(ctx, v.Name()); err != nil {
			return nil, err
		}
		if own := in.c.o.Signer.Key(); trust == "" && own != nil && own.Origin() == v.Name() {
			trust = own.VKey
		}
	}
	if trust != vkey {
		return nil, &UntrustedError{vkey, trust}
	}
	in.vkey = vkey
	return v, nil
}

// begin looks whether a bundle fits to what is here.
func (in *importing) begin(ctx context.Context, list bundle.Contents) error {
	var unfit UnfitError
	var missing []string
	for _, im := range list.Images {
		ref, err := audit.ParseRef(im.Ref)
		if err != nil {
			return err
		}
		if !in.c.o.Upstream(ref.Upstream) {
			missing = append(missing, ref.Upstream)
		}
		in.histories[ref] = &audit.History{Source: list.Origin}
	}
	slices.Sort(missing)
	for _, name := range slices.Compact(missing) {
		unfit.add("%s is not a configured upstream here: clients could not ask for its images; name it under upstreams, which needs no network", name)
	}
	for _, b := range list.Omitted {
		if _, here := in.c.o.Cache.Holds(b.Digest); !here {
			unfit.add("%s, which is not all here: %s is missing; import that first, or have the whole exported without --since", baseName(list), b.Digest)
			break
		}
	}
	if err := unfit.orNil(); err != nil {
		return err
	}
	var content []cache.Reference
	for _, b := range slices.Concat(list.Manifests, list.Blobs, list.Omitted) {
		content = append(content, cache.Reference(b))
	}
	var err error
	in.intake, err = in.c.o.Cache.Intake(ctx, content)
	return err
}

func baseName(list bundle.Contents) string {
	base := fmt.Sprintf("what %s had at %d entries", list.Origin, list.Base.LogSize)
	if list.Base.Bundle != "" {
		base = "the bundle " + list.Base.Bundle.String() + " of " + list.Origin
	}
	return "it is a delta to " + base
}

func (in *importing) event(e audit.Entry) error {
	ev, err := audit.ParseLeaf(e.Leaf)
	if err != nil {
		return err
	}
	in.histories[ev.Ref].Add(e.Index, ev)
	return nil
}

// cargo is what the ledger is told. All content is here.
func (in *importing) cargo(ctx context.Context, list bundle.Contents) (audit.Cargo, error) {
	out := audit.Cargo{Bundle: list.ID(), Origin: list.Origin, VKey: in.vkey, LogSize: list.LogSize}
	for _, im := range list.Images {
		ref, err := audit.ParseRef(im.Ref)
		if err != nil {
			return out, err
		}
		h := in.histories[ref]
		carried := audit.Carried{
			Ref: ref, Digest: im.Digest, MediaType: im.MediaType, Size: im.Size, Confirmed: im.LastConfirmed,
			Profile: h.Profile(), Platforms: im.Platforms, Claims: h.All(), Closed: h.Closed,
		}
		if carried.Referrers, err = in.referrers(ctx, list, ref, im); err != nil {
			return out, err
		}
		out.Refs = append(out.Refs, carried)
	}
	return out, nil
}

// referrers are those of a list that are about an image, and about those.
func (in *importing) referrers(ctx context.Context, list bundle.Contents, ref audit.Ref, im bundle.Image) ([]audit.Referrer, error) {
	p, _, err := in.c.gather(ctx, im.Digest, im.Platforms)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", im.Ref, err)
	}
	if len(p.missing) > 0 {
		return nil, fmt.Errorf("%s: %s went away while it was imported: import it again", im.Ref, p.missing[0].Digest)
	}
	about := maps.Clone(p.manifests)
	var out []audit.Referrer
	for more := true; more; {
		more = false
		for _, r := range list.Referrers {
			_, known := about[r.Descriptor.Digest]
			_, wanted := about[r.Subject]
			if known || !wanted || r.Repository != ref.Upstream+"/"+ref.Repository {
				continue
			}
			descriptor, err := json.Marshal(r.Descriptor)
			if err != nil {
				return nil, err
			}
			out = append(out, audit.Referrer{Subject: r.Subject, Digest: r.Descriptor.Digest, Descriptor: descriptor})
			about[r.Descriptor.Digest], more = r.Descriptor.Size, true
		}
	}
	return out, nil
}

// close leaves what was put for the next time.
func (in *importing) close() {
	if in.intake != nil {
		in.intake.Close()
	}
}
