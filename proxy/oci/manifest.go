package oci

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types that Docker registries use beside those of the image specification.
const (
	DockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	DockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	DockerSchema1      = "application/vnd.docker.distribution.manifest.v1+json"
	DockerSchema1JWS   = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

// MaxManifest bounds the size of a manifest in bytes (distribution-spec,
// "Pushing Manifests", asks registries for at least this much).
const MaxManifest = 4 << 20

// maxMediaType bounds a media type in bytes: RFC 6838, section 4.2, gives each of
// its two names 127.
const maxMediaType = 255

// Accept is the canonical profile with which tidemark asks for manifests. The
// order is fixed and nothing else is offered, so that the digest a tag answers
// with never depends on which client happened to ask.
var Accept = strings.Join([]string{ocispec.MediaTypeImageIndex, DockerManifestList, ocispec.MediaTypeImageManifest, DockerManifest}, ", ")

// AcceptProfile names Accept in the ledger's evidence. It changes with Accept.
const AcceptProfile = "canonical-1"

// A Descriptor points from a manifest to content. Size is -1 when the manifest
// does not tell.
type Descriptor struct {
	Digest   digest.Digest
	Size     int64
	Platform string // of an image in an index, os/arch[/variant]; "" if it is about another, or not told
}

// A Description is what a manifest's own bytes say about it.
type Description struct {
	MediaType string
	Index     bool         // Refers are manifests, one a platform; otherwise config and layers
	Refers    []Descriptor // in the order of the manifest, without those that live elsewhere
}

// Describe reads the media type and the references of a manifest. Bytes that
// are no manifest are an error, and so is a reference with an invalid digest.
func Describe(manifest []byte) (Description, error) {
	type descriptor struct {
		MediaType string   `json:"mediaType"`
		Digest    string   `json:"digest"`
		Size      *int64   `json:"size"`
		URLs      []string `json:"urls"`
		Platform  *struct {
			OS           string `json:"os"`
			Architecture string `json:"architecture"`
			Variant      string `json:"variant"`
		} `json:"platform"`
	}
	var m struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Config        *descriptor       `json:"config"`
		Layers        []descriptor      `json:"layers"`
		Manifests     []descriptor      `json:"manifests"`
		FSLayers      []json.RawMessage `json:"fsLayers"`
		Signatures    []json.RawMessage `json:"signatures"`
	}
	if err := json.Unmarshal(manifest, &m); err != nil {
		return Description{}, fmt.Errorf("manifest is not JSON: %w", err)
	}
	if len(m.MediaType) > maxMediaType {
		return Description{}, fmt.Errorf("the media type of the manifest has %d bytes", len(m.MediaType))
	}
	d := Description{MediaType: m.MediaType}
	var refs []descriptor
	switch {
	case m.SchemaVersion == 1 || m.FSLayers != nil:
		// Its references are layers without sizes; it is passed on, not kept together.
		if d.MediaType = DockerSchema1; len(m.Signatures) > 0 {
			d.MediaType = DockerSchema1JWS
		}
		return d, nil
	case m.Manifests != nil && (m.Config != nil || m.Layers != nil):
		// Readers would differ about what it is (CVE-2021-41190).
		return Description{}, fmt.Errorf("manifest is both an index and an image")
	case m.Manifests != nil || m.MediaType == ocispec.MediaTypeImageIndex || m.MediaType == DockerManifestList:
		if d.MediaType == "" {
			d.MediaType = ocispec.MediaTypeImageIndex
		}
		d.Index, refs = true, m.Manifests
	case m.Config != nil:
		if d.MediaType == "" {
			d.MediaType = ocispec.MediaTypeImageManifest
		}
		refs = append([]descriptor{*m.Config}, m.Layers...)
	case m.MediaType != "":
		return d, nil // an artifact of a type not known here; its bytes are what counts
	default:
		return Description{}, fmt.Errorf("manifest has neither mediaType, config, manifests nor fsLayers")
	}
	for _, r := range refs {
		dgst, err := ParseDigest(r.Digest)
		if err != nil {
			return Description{}, fmt.Errorf("manifest refers to %.100q, which is no digest", r.Digest)
		}
		if len(r.URLs) > 0 {
			continue // a foreign layer: clients fetch it from there
		}
		size := int64(-1)
		if r.Size != nil && *r.Size >= 0 {
			size = *r.Size
		}
		platform := ""
		if p := r.Platform; p != nil && p.OS != "unknown" {
			platform = strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
		}
		d.Refers = append(d.Refers, Descriptor{dgst, size, platform})
	}
	return d, nil
}
