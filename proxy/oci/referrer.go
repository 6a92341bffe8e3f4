package oci

import (
	"encoding/json"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Referring reads what a manifest refers to as its subject, and returns the
// descriptor under which a registry would list it there (distribution-spec, "Listing
// Referrers"). Most manifests have no subject.
func Referring(manifest []byte) (subject digest.Digest, listed ocispec.Descriptor, ok bool) {
	var m struct {
		MediaType    string              `json:"mediaType"`
		ArtifactType string              `json:"artifactType"`
		Config       *ocispec.Descriptor `json:"config"`
		Subject      *ocispec.Descriptor `json:"subject"`
		Annotations  map[string]string   `json:"annotations"`
	}
	if json.Unmarshal(manifest, &m) != nil || m.Subject == nil {
		return "", listed, false
	}
	subject, err := ParseDigest(string(m.Subject.Digest))
	if err != nil {
		return "", listed, false
	}
	if m.ArtifactType == "" && m.Config != nil {
		m.ArtifactType = m.Config.MediaType
	}
	d, err := Describe(manifest)
	if err != nil {
		return "", listed, false
	}
	return subject, ocispec.Descriptor{
		MediaType: d.MediaType, ArtifactType: m.ArtifactType, Digest: digest.FromBytes(manifest), Size: int64(len(manifest)), Annotations: m.Annotations,
	}, true
}
