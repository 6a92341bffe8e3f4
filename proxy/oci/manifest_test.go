package oci_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/proxy/oci"
)

// one, two and three stand for content; in manifests they are written $1, $2, $3.
var one, two, three = digest.FromString("1"), digest.FromString("2"), digest.FromString("3")

func manifest(text string) []byte {
	return []byte(strings.NewReplacer("$1", one.String(), "$2", two.String(), "$3", three.String()).Replace(text))
}

// A manifest tells its media type, also when it leaves it out, and what has to
// be here so that the image is complete.
func TestManifestsAreDescribed(t *testing.T) {
	const config, layers = `"config": {"mediaType": "c", "digest": "$1", "size": 1}`, `"layers": [{"digest": "$2", "size": 2}, {"digest": "$3", "size": 0}]`
	image := []oci.Descriptor{{Digest: one, Size: 1}, {Digest: two, Size: 2}, {Digest: three, Size: 0}}
	platforms := []oci.Descriptor{{Digest: one, Size: 1, Platform: "linux/arm64"}, {Digest: two, Size: 2}}
	const manifests = `"manifests": [{"digest": "$1", "size": 1, "platform": {"os": "linux", "architecture": "arm64"}}, {"digest": "$2", "size": 2}]`

	for _, tt := range []struct {
		name, manifest string
		want           oci.Description
	}{
		{"oci image", `{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", ` + config + `, ` + layers + `}`,
			oci.Description{MediaType: ocispec.MediaTypeImageManifest, Refers: image}},
		{"docker image", `{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", ` + config + `, ` + layers + `}`,
			oci.Description{MediaType: oci.DockerManifest, Refers: image}},
		{"image without media type", `{"schemaVersion": 2, ` + config + `, ` + layers + `}`,
			oci.Description{MediaType: ocispec.MediaTypeImageManifest, Refers: image}},
		{"image without layers", `{"schemaVersion": 2, ` + config + `}`,
			oci.Description{MediaType: ocispec.MediaTypeImageManifest, Refers: image[:1]}},
		{"image with an attachment's subject", `{"schemaVersion": 2, ` + config + `, "layers": [], "artifactType": "a/b", "subject": {"digest": "$3", "size": 3}, "annotations": {"a": "b"}}`,
			oci.Description{MediaType: ocispec.MediaTypeImageManifest, Refers: image[:1]}},

		{"oci index", `{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", ` + manifests + `}`,
			oci.Description{MediaType: ocispec.MediaTypeImageIndex, Index: true, Refers: platforms}},
		{"docker list", `{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.list.v2+json", ` + manifests + `}`,
			oci.Description{MediaType: oci.DockerManifestList, Index: true, Refers: platforms}},
		{"index without media type", `{"schemaVersion": 2, ` + manifests + `}`,
			oci.Description{MediaType: ocispec.MediaTypeImageIndex, Index: true, Refers: platforms}},
		{"empty index", `{"schemaVersion": 2, "manifests": []}`,
			oci.Description{MediaType: ocispec.MediaTypeImageIndex, Index: true}},
		{"index without manifests", `{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json"}`,
			oci.Description{MediaType: ocispec.MediaTypeImageIndex, Index: true}},

		{"schema 1", `{"schemaVersion": 1, "name": "a", "tag": "b", "fsLayers": [{"blobSum": "$1"}], "history": [{}]}`,
			oci.Description{MediaType: oci.DockerSchema1}},
		{"signed schema 1", `{"schemaVersion": 1, "fsLayers": [{"blobSum": "$1"}], "signatures": [{"protected": "x"}]}`,
			oci.Description{MediaType: oci.DockerSchema1JWS}},

		{"artifact of the past", `{"mediaType": "application/vnd.oci.artifact.manifest.v1+json", "artifactType": "a/b", "blobs": [{"digest": "$1", "size": 1}]}`,
			oci.Description{MediaType: "application/vnd.oci.artifact.manifest.v1+json"}},
		{"artifact with the empty config", `{"schemaVersion": 2, "artifactType": "a/b", "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": "$1", "size": 2, "data": "e30="}, "layers": [{"digest": "$2", "size": 2}]}`,
			oci.Description{MediaType: ocispec.MediaTypeImageManifest, Refers: []oci.Descriptor{{Digest: one, Size: 2}, {Digest: two, Size: 2}}}},

		{"layers that live elsewhere", `{"schemaVersion": 2, ` + config + `, "layers": [{"digest": "$2", "size": 2, "urls": ["https://example.com/layer"]}, {"digest": "$3", "size": 3, "urls": []}]}`,
			oci.Description{MediaType: ocispec.MediaTypeImageManifest, Refers: []oci.Descriptor{{Digest: one, Size: 1}, {Digest: three, Size: 3}}}},
		{"sizes that are not told", `{"schemaVersion": 2, "config": {"digest": "$1"}, "layers": [{"digest": "$2", "size": -5}, {"digest": "$3", "size": null}]}`,
			oci.Description{MediaType: ocispec.MediaTypeImageManifest, Refers: []oci.Descriptor{{Digest: one, Size: -1}, {Digest: two, Size: -1}, {Digest: three, Size: -1}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := oci.Describe(manifest(tt.manifest))
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("described as %+v, %v\nwant %+v", got, err, tt.want)
			}
		})
	}
}

// What is no manifest is not taken for one: a login page, a list, half a
// manifest, one whose references cannot be asked for.
func TestWhatIsNoManifest(t *testing.T) {
	for _, text := range []string{
		``, ` `, `<html>`, `null`, `[]`, `"manifest"`, `1`, `{}`, `{"errors": [{"code": "UNKNOWN"}]}`,
		`{"schemaVersion": 2, "config": {"digest": "$1"}`,
		`{"schemaVersion": 2, "config": {"digest": "$1"}}{}`,
		`{"schemaVersion": 2, "layers": [{"digest": "$1"}]}`,
		`{"schemaVersion": 2, "config": "$1"}`,
		`{"schemaVersion": 2, "config": {}}`,
		`{"schemaVersion": 2, "config": {"digest": ""}}`,
		`{"schemaVersion": 2, "config": {"digest": "sha256:12"}}`,
		`{"schemaVersion": 2, "config": {"digest": "../../etc/passwd"}}`,
		`{"schemaVersion": 2, "config": {"digest": "$1"}, "layers": [{"digest": "md5:00000000000000000000000000000000"}]}`,
		`{"schemaVersion": 2, "config": {"digest": "$1"}, "layers": {"digest": "$2"}}`,
		`{"schemaVersion": 2, "manifests": [{"digest": "$1"}, {"digest": "latest"}]}`,
		`{"schemaVersion": 2, "manifests": [null]}`,
		`{"schemaVersion": 2, "config": {"digest": "$1", "size": "1"}}`,
	} {
		if got, err := oci.Describe(manifest(text)); err == nil {
			t.Errorf("%s is described as %+v", text, got)
		}
	}
}

// Upstream is asked for lists before single images, and for nothing that this
// server would have to convert.
func TestAcceptIsTheCanonicalProfile(t *testing.T) {
	want := "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
	if oci.Accept != want || oci.AcceptProfile != "canonical-1" {
		t.Errorf("profile %s asks for\n%s\nwant canonical-1 with\n%s", oci.AcceptProfile, oci.Accept, want)
	}
}

// Whatever upstream sends as a manifest, what is read from it can be used.
func FuzzDescribe(f *testing.F) {
	for _, seed := range []string{
		`{}`, `null`, `{"schemaVersion": 1, "fsLayers": [{"blobSum": "$1"}], "signatures": [{}]}`,
		`{"schemaVersion": 2, "mediaType": "a", "config": {"digest": "$1", "size": 1}, "layers": [{"digest": "$2", "urls": ["u"]}, {"digest": "$3", "size": -1}]}`,
		`{"schemaVersion": 2, "manifests": [{"digest": "$1", "size": 9223372036854775807}], "config": null}`,
		`{"mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [], "Manifests": [{"DIGEST": "$1"}]}`,
	} {
		f.Add(manifest(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := oci.Describe(data)
		if err != nil {
			if !reflect.DeepEqual(d, oci.Description{}) {
				t.Fatalf("%q = %+v and %v, want one of them", data, d, err)
			}
			return
		}
		if d.MediaType == "" {
			t.Fatalf("%q has no media type", data)
		}
		for _, r := range d.Refers {
			if r.Digest.Validate() != nil || r.Size < -1 {
				t.Fatalf("%q refers to %+v", data, r)
			}
		}
	})
}
