package oci

import (
	"encoding/base64"
	"encoding/json"

	"github.com/opencontainers/go-digest"
)

// SignedDigest is the digest by which registries know a signed manifest of schema 1:
// that of what was signed, without the signatures (distribution's image manifest
// v2, schema 1, "Signed Manifests"). It is "" for whatever is none.
func SignedDigest(manifest []byte) digest.Digest {
	var m struct {
		SchemaVersion int `json:"schemaVersion"`
		Signatures    []struct {
			Protected string `json:"protected"`
		} `json:"signatures"`
	}
	if json.Unmarshal(manifest, &m) != nil || m.SchemaVersion != 1 || len(m.Signatures) == 0 {
		return ""
	}
	protected, err := base64.RawURLEncoding.DecodeString(m.Signatures[0].Protected)
	if err != nil {
		return ""
	}
	var p struct {
		FormatLength int    `json:"formatLength"`
		FormatTail   string `json:"formatTail"`
	}
	if json.Unmarshal(protected, &p) != nil || p.FormatLength < 0 || p.FormatLength > len(manifest) {
		return ""
	}
	tail, err := base64.RawURLEncoding.DecodeString(p.FormatTail)
	if err != nil {
		return ""
	}
	return digest.FromBytes(append(manifest[:p.FormatLength:p.FormatLength], tail...))
}
