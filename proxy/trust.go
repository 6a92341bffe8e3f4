package proxy

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
	"tidemark/audit/diff"
	"tidemark/proxy/oci"
)

// What stands beside an image that says who made it, and how: signatures and
// attestations, found where the tools put them. Nothing is verified here: a move is
// judged by what was there before and is there no more (AUDIT.md, A5).

// trustChange compares what stands beside two digests, nil if nothing stood beside the
// old one, or it cannot be told. known is what stood beside the old one in its time, nil if
// nobody looked: who has the publisher's rights can take it away before the move.
func (r repository) trustChange(ctx context.Context, old, new digest.Digest, known *audit.Trust) *audit.TrustChange {
	if known == nil {
		had, err := r.trust(ctx, old)
		if err != nil {
			return nil
		}
		known = &had
	}
	if known.None() {
		return nil
	}
	had := *known
	has, err := r.trust(ctx, new)
	if err != nil {
		return nil
	}
	return &audit.TrustChange{Old: had, New: has}
}

// Where tools put what they have to say.
const (
	inToto     = "in-toto.io/predicate-type" // of the layers of BuildKit's attestations
	cosignCert = "dev.sigstore.cosign/certificate"
	cosignType = "predicateType"                       // of the layers of cosign's attestations
	bundleType = "application/vnd.dev.sigstore.bundle" // and what follows, of an artifact
	bundleSays = "dev.sigstore.bundle.predicateType"
	notation   = "application/vnd.cncf.notary.signature"
	looked     = 8 // referrers of a kind that are looked into
)

// trust finds out what stands beside a digest now. That something does not exist is an
// answer; that upstream does not answer is an error.
func (r repository) trust(ctx context.Context, dgst digest.Digest) (t audit.Trust, err error) {
	err = errors.Join(r.attested(ctx, dgst, &t), r.referredTo(ctx, dgst, &t), r.tagged(ctx, dgst, &t))
	for i, s := range t.Signers {
		t.Signers[i] = plain(s)
	}
	slices.Sort(t.Signers)
	t.Signers = slices.Compact(t.Signers)
	return t, err
}

// signerMost bounds in bytes what is kept of a signer's name: certificates are upstream's,
// and what they say becomes part of an entry.
const signerMost = 200

// plain is a name without what could not be shown.
func plain(name string) string {
	name = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, name)
	if len(name) > signerMost {
		name = strings.ToValidUTF8(name[:signerMost], "") + "…"
	}
	return name
}

// attested looks at the attestations that BuildKit puts into an index.
func (r repository) attested(ctx context.Context, dgst digest.Digest, t *audit.Trust) error {
	var index ocispec.Index
	if err := r.readJSON(ctx, dgst, &index); err != nil {
		return err
	}
	left := looked
	for _, d := range index.Manifests {
		if !diff.IsAttestation(d) || left == 0 || t.Provenance && t.SBOM {
			continue
		}
		left--
		var m ocispec.Manifest
		if err := r.readJSON(ctx, d.Digest, &m); err != nil {
			return err
		}
		for _, l := range m.Layers {
			note(t, l.Annotations[inToto])
		}
	}
	return nil
}

// referredTo looks at what refers to a digest, by the API or by the tag schema.
func (r repository) referredTo(ctx context.Context, dgst digest.Digest, t *audit.Trust) error {
	list, err := r.upstream.Referrers(ctx, r.Repository, dgst)
	if errors.Is(err, fs.ErrNotExist) {
		var index referrerIndex
		if err := r.readTag(ctx, oci.ReferrersTag(dgst), &index); err != nil {
			return err
		}
		list = index.Manifests
	} else if err != nil {
		return err
	}
	left := looked
	for _, ref := range list {
		var d ocispec.Descriptor
		if json.Unmarshal(ref.Descriptor, &d) != nil {
			continue
		}
		note(t, d.ArtifactType) // application/spdx+json, application/vnd.cyclonedx+json
		note(t, d.Annotations[inToto])
		note(t, d.Annotations[bundleSays])
		if d.ArtifactType == notation {
			t.Signers = append(t.Signers, "notation")
		}
		if strings.HasPrefix(d.ArtifactType, bundleType) && left > 0 {
			left--
			if err := r.bundled(ctx, d.Digest, t); err != nil {
				return err
			}
		}
	}
	return nil
}

// bundled looks into a sigstore bundle (protobuf-specs, sigstore_bundle.proto).
func (r repository) bundled(ctx context.Context, dgst digest.Digest, t *audit.Trust) error {
	var m ocispec.Manifest
	if err := r.readJSON(ctx, dgst, &m); err != nil || len(m.Layers) == 0 {
		return err
	}
	body, err := r.cache.Read(ctx, m.Layers[0].Digest, r.blob(m.Layers[0].Digest), oci.MaxManifest)
	if err != nil {
		return absentIsNone(err)
	}
	type certificate struct {
		RawBytes []byte `json:"rawBytes"`
	}
	var b struct {
		Material struct {
			Certificate *certificate `json:"certificate"`
			Chain       struct {
				Certificates []certificate `json:"certificates"`
			} `json:"x509CertificateChain"`
		} `json:"verificationMaterial"`
		Envelope *struct {
			Payload []byte `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	if json.Unmarshal(body, &b) != nil {
		return nil // somebody's file that only looks like one
	}
	signed := b.Envelope == nil
	if b.Envelope != nil {
		var statement struct {
			PredicateType string `json:"predicateType"`
		}
		if json.Unmarshal(b.Envelope.Payload, &statement) == nil {
			note(t, statement.PredicateType)
			signed = strings.Contains(statement.PredicateType, "cosign/sign")
		}
	}
	if !signed {
		return nil
	}
	signer := "key"
	if c := b.Material.Certificate; c != nil {
		signer = signerOf(c.RawBytes)
	} else if len(b.Material.Chain.Certificates) > 0 {
		signer = signerOf(b.Material.Chain.Certificates[0].RawBytes)
	}
	t.Signers = append(t.Signers, signer)
	return nil
}

// tagged looks at the tags that cosign makes for a digest.
func (r repository) tagged(ctx context.Context, dgst digest.Digest, t *audit.Trust) error {
	tag := oci.ReferrersTag(dgst)
	var signatures, attestations, sbom ocispec.Manifest
	if err := errors.Join(r.readTag(ctx, tag+".sig", &signatures), r.readTag(ctx, tag+".att", &attestations), r.readTag(ctx, tag+".sbom", &sbom)); err != nil {
		return err
	}
	for _, l := range signatures.Layers[:min(len(signatures.Layers), looked)] {
		signer := "key"
		if block, _ := pem.Decode([]byte(l.Annotations[cosignCert])); block != nil {
			signer = signerOf(block.Bytes)
		}
		t.Signers = append(t.Signers, signer)
	}
	for _, l := range attestations.Layers {
		note(t, l.Annotations[cosignType])
	}
	t.SBOM = t.SBOM || len(sbom.Layers) > 0
	return nil
}

// note notes what a type of statement is about.
func note(t *audit.Trust, kind string) {
	kind = strings.ToLower(kind)
	t.Provenance = t.Provenance || strings.Contains(kind, "provenance")
	t.SBOM = t.SBOM || strings.Contains(kind, "spdx") || strings.Contains(kind, "cyclonedx")
}

// The extensions of Fulcio's certificates that say who vouches for the identity
// (sigstore/fulcio, docs/oid-info.md).
var (
	issuerV2 = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 8}
	issuerV1 = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 1}
)

// signerOf is whom a certificate is for, and who says so.
func signerOf(der []byte) string {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return "key"
	}
	name := c.Subject.CommonName
	switch {
	case len(c.URIs) > 0:
		name = c.URIs[0].String()
	case len(c.EmailAddresses) > 0:
		name = c.EmailAddresses[0]
	}
	for _, id := range []asn1.ObjectIdentifier{issuerV2, issuerV1} {
		i := slices.IndexFunc(c.Extensions, func(x pkix.Extension) bool { return x.Id.Equal(id) })
		if i < 0 {
			continue
		}
		issuer := string(c.Extensions[i].Value)
		if id.Equal(issuerV2) {
			var text string
			if _, err := asn1.Unmarshal(c.Extensions[i].Value, &text); err == nil {
				issuer = text
			}
		}
		return name + " by " + issuer
	}
	return name
}

// readJSON reads a manifest into v. What does not exist leaves it as it is.
func (r repository) readJSON(ctx context.Context, dgst digest.Digest, v any) error {
	if dgst.Validate() != nil {
		return nil
	}
	body, err := r.cache.Read(ctx, dgst, r.manifest(dgst), oci.MaxManifest)
	if err != nil {
		return absentIsNone(err)
	}
	_ = json.Unmarshal(body, v) // what is no manifest says nothing
	return nil
}

// readTag reads what a tag means into v, past the ledger: it is about another tag. It is
// asked with HEAD first, which rate limits do not count.
func (r repository) readTag(ctx context.Context, tag string, v any) error {
	if _, err := r.upstream.HeadManifest(ctx, r.Repository, tag); err != nil {
		r.upstream.Forget(r.Repository, tag) // it may be on its way
		return absentIsNone(err)
	}
	m, err := r.upstream.GetManifest(ctx, r.Repository, tag)
	if err != nil {
		return absentIsNone(err)
	}
	_ = json.Unmarshal(m.Body, v) // what is no manifest says nothing
	return nil
}

// absentIsNone takes for an answer that there is no such thing.
func absentIsNone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
