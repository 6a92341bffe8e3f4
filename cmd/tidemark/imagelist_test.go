package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Files that people have name the images that they mean.
func TestFilesThatNameImages(t *testing.T) {
	env := map[string]string{"TAG": "1.27", "EMPTY": "", "REGISTRY": "ghcr.io/org"}
	for name, tt := range map[string]struct{ file, want string }{
		"a list":             {"# what we run\nnginx:1.27\r\n\n  ghcr.io/org/app:v1   # the app\n- alpine\n\"redis:7\"\n", "2 nginx:1.27, 4 ghcr.io/org/app:v1, 5 alpine, 6 redis:7"},
		"one image":          {"nginx", "1 nginx"},
		"by digest":          {"nginx@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n", "1 nginx@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"},
		"nothing":            {"\n# none\n", ""},
		"with a mark before": {"\ufeffnginx:1\n", "1 nginx:1"},
		"a compose file": {`
services:
  web:
    image: nginx:${TAG}
  app:
    build: .
  built: {build: ., image: }
  job: {image: "${REGISTRY}/app:${VERSION:-v1}"}
  odd: {image: 'a$$b', x: 1}
  set: {image: "redis${TAG:+:7}"}
  unset: {image: "redis${EMPTY:+:7}-${EMPTY-x}"}
  nested: {image: 'app:${VERSION:-${OTHER:-v${TAG}}}'}
`, "4 nginx:1.27, 8 ghcr.io/org/app:v1, 9 a$b, 10 redis:7, 11 redis-, 12 app:v1.27"},
		"a compose file with anchors": {`
x-image: &image nginx:1
services:
  one: &one
    image: *image
  two: {image: alpine}
  three:
    <<: *one
`, "5 nginx:1, 6 alpine, 5 nginx:1"},
		"manifests of Kubernetes": {`
apiVersion: v1
kind: Pod
spec:
  initContainers: [{name: i, image: busybox}]
  containers:
  - name: c
    image: nginx:1.27
  ephemeralContainers: [{image: debug}]
  volumes:
  - name: models
    image: {reference: ghcr.io/org/model:1}
  - name: other
    emptyDir: {}
---
apiVersion: apps/v1
kind: Deployment
spec: {template: {spec: {containers: [{image: app:1}]}}}
---
apiVersion: batch/v1
kind: CronJob
spec: {jobTemplate: {spec: {template: {spec: {containers: [{image: job:1}]}}}}}
---
kind: ConfigMap
data: {image: "not an image"}
`, "5 busybox, 8 nginx:1.27, 9 debug, 12 ghcr.io/org/model:1, 18 app:1, 22 job:1"},
		"JSON of kubectl": {`{"apiVersion":"v1","kind":"List","items":[{"kind":"Pod","spec":{"containers":[{"image":"nginx"}]}}]}`, "1 nginx"},
	} {
		t.Run(name, func(t *testing.T) {
			images, err := imagesIn("f", []byte(tt.file), func(k string) (string, bool) { v, ok := env[k]; return v, ok })
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, im := range images {
				got = append(got, fmt.Sprint(im.line, " ", im.image))
			}
			if strings.Join(got, ", ") != tt.want {
				t.Errorf("%s\nwant %s", strings.Join(got, ", "), tt.want)
			}
		})
	}
}

// What is wrong in such a file is told, all of it, with its line.
func TestFilesThatNameNoImages(t *testing.T) {
	none := func(string) (string, bool) { return "", false }
	for name, tt := range map[string]struct{ file, want string }{
		"a variable that is not set":   {"services:\n  a: {image: \"x:${TAG}\"}\n  b: {image: \"y:${OTHER:?name it}\"}\n", "f:2: TAG is not set"},
		"and the next one":             {"services:\n  a: {image: \"x:${TAG}\"}\n  b: {image: \"y:${OTHER:?name it}\"}\n", "f:3: OTHER is not set: name it"},
		"something else in YAML":       {"name: x\nversion: 3\n", "neither a list of images"},
		"broken YAML":                  {"services:\n  a: {image: [\n", "neither YAML nor a list"},
		"two on a line":                {"services:\n  a: {image: \"${A}:${B}\"}\n", "f:2: B is not set"},
		"a variable without an end":    {"services:\n  a: {image: 'x:${TAG'}\n", "f:2: \"${TAG\" is no variable"},
		"an alias that merges itself":  {"a: &a\n  <<: *a\nservices: {x: *a}\n", "part of itself"},
		"an alias that holds itself":   {"kind: Pod\nspec: &s\n  spec: *s\n", "part of itself"},
		"aliases that multiply":        {multiplied(), "more than 10000 aliases"},
		"an image that is nothing":     {"services:\n  a: {image: \"\"}\n", "f:2: the image is empty"},
		"an image that is no text":     {"kind: Pod\nspec: {containers: [{image: {a: b}}]}\n", "f:2: the image is empty"},
		"a document among several bad": {"kind: Pod\n---\nfoo: bar\n", "f:3: "},
	} {
		if _, err := imagesIn("f", []byte(tt.file), none); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

// multiplied is a small document that stands for a very large one.
func multiplied() string {
	s := "a0: &a0 {image: x}\n"
	for i := 1; i < 30; i++ {
		s += fmt.Sprintf("a%d: &a%d {<<: [*a%d, *a%d]}\n", i, i, i-1, i-1)
	}
	return s + "services: {z: *a29}\n"
}

// Images of arguments and files are whole references, each once, and everything that
// is wrong with any is told at once.
func TestNamedImages(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write(".env", "# versions\nexport TAG=\"1.27\" # of nginx\nV=7 # of redis\n")
	compose, list := write("compose.yaml", "services: {web: {image: \"nginx:${TAG}\"}, db: {image: \"redis:$V\"}}\n"), write("list", "Nginx\nalpine:3 x\n")
	c := &cobra.Command{}
	c.SetIn(bytes.NewBufferString("redis:7\nnginx:1.27\n"))
	got, err := namedImages(c, []string{"alpine"}, []string{compose, "-"})
	want := "docker.io/library/alpine:latest docker.io/library/nginx:1.27 docker.io/library/redis:7"
	if err != nil || strings.Join(got, " ") != want {
		t.Errorf("%v, %v; want %s", got, err, want)
	}
	_, err = namedImages(c, []string{"UPPER"}, []string{filepath.Join(dir, "absent"), list})
	for _, want := range []string{`"UPPER" is not an image reference`, "absent: no such file", list + `:1: "Nginx" is not`, list + `:2: "alpine:3 x" is not`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q in it", err, want)
		}
	}
	if _, err := namedImages(c, nil, nil); err == nil || !strings.Contains(err.Error(), "no image is named") {
		t.Errorf("nothing at all: %v", err)
	}
	if _, err := namedImages(c, nil, []string{filepath.Join(dir, "absent")}); err == nil {
		t.Error("a file that is not there")
	}
}
