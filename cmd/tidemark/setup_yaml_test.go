package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

var yamlWants = []yamlWant{
	{[]string{"configs", "127.0.0.1:5050", "tls", "ca_file"}, k3sCA, false},
	{[]string{"mirrors", "docker.io", "endpoint"}, mirror, true},
	{[]string{"mirrors", "ghcr.io", "endpoint"}, mirror, true},
}

// What is wanted is added to registries.yaml, in whatever way that is written, and
// everything else stays as it is, comments included.
func TestMirrorsAreAddedToRegistriesYAML(t *testing.T) {
	const endpoint = ":\n    endpoint:\n      - \"" + mirror + "\"\n"
	const both = "  \"docker.io\"" + endpoint + "  \"ghcr.io\"" + endpoint
	const configs = "configs:\n  \"127.0.0.1:5050\":\n    tls:\n      ca_file: \"" + k3sCA + "\"\n"
	for _, c := range []struct{ name, old, want string }{
		{"no file", "", "mirrors:\n" + both + configs},
		{"comments", "# ours", "# ours\nmirrors:\n" + both + configs},
		{"others", "mirrors: # all\n  # for the lab\n  quay.io:\n    endpoint: [https://a.example]\n", "mirrors: # all\n" + both + "  # for the lab\n  quay.io:\n    endpoint: [https://a.example]\n" + configs},
		{"no line end", "mirrors:\n  a.example: {}", "mirrors:\n" + both + "  a.example: {}\n" + configs},
		{"another indentation", "---\nmirrors:\n    quay.io:\n        endpoint:\n        - x\n", "---\nmirrors:\n" +
			strings.ReplaceAll("    \"docker.io\":\n      endpoint:\n        - \"M\"\n    \"ghcr.io\":\n      endpoint:\n        - \"M\"\n", "M", mirror) + "    quay.io:\n        endpoint:\n        - x\n" + configs},
		{"empty mappings", "mirrors: {}\nconfigs:\n", "mirrors: {\"docker.io\": {endpoint: [\"" + mirror + "\"]}, \"ghcr.io\": {endpoint: [\"" + mirror + "\"]}}\n" + strings.Replace(configs, "tls:\n", "tls:\n", 1)},
		{"in braces", "{mirrors: {ä: {endpoint: [x]}}, configs: {\"127.0.0.1:5050\": {auth: {username: u}}}} # all\n",
			"{mirrors: {\"docker.io\": {endpoint: [\"" + mirror + "\"]}, \"ghcr.io\": {endpoint: [\"" + mirror + "\"]}, ä: {endpoint: [x]}}, configs: {\"127.0.0.1:5050\": {tls: {ca_file: \"" + k3sCA + "\"}, auth: {username: u}}}} # all\n"},
		{"a password for the server", configs[:9] + "  \"127.0.0.1:5050\":\n    auth:\n      username: u\nmirrors:\n" + both,
			configs[:9] + "  \"127.0.0.1:5050\":\n    tls:\n      ca_file: \"" + k3sCA + "\"\n    auth:\n      username: u\nmirrors:\n" + both},
		{"there already, written otherwise", "mirrors:\n  docker.io: {endpoint: [other, '" + mirror + "/']}\n  ghcr.io:\n    endpoint: ['" + mirror + "']\nconfigs: {'127.0.0.1:5050': {tls: {ca_file: " + k3sCA + "}}}\n", ""},
		{"the embedded registry", "mirrors:\n  \"*\":\n", "mirrors:\n" + both + "  \"*\":\n" + configs},
	} {
		if c.want == "" {
			c.want = c.old
		}
		got, err := editRegistriesYAML([]byte(c.old), yamlWants)
		if err != nil || string(got) != c.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", c.name, err, got, c.want)
		}
		again, err := editRegistriesYAML(got, yamlWants)
		if err != nil || !bytes.Equal(again, got) {
			t.Errorf("%s: a second time it becomes %v\n%s", c.name, err, again)
		}
	}
}

// What somebody else has set up, or has written in a way that nothing can be added
// to, is refused, and the error says where.
func TestRegistriesYAMLOfSomebodyElseIsRefused(t *testing.T) {
	for _, c := range []struct{ old, says string }{
		{"mirrors:\n  docker.io:\n    endpoint: [https://a.example]\n", "line 3: there is another mirrors.docker.io.endpoint"},
		{"mirrors:\n  docker.io:\n    endpoint: https://a.example\n", "line 3: there is another"},
		{"configs:\n  \"127.0.0.1:5050\":\n    tls:\n      ca_file: /a\n", "line 4: there is another configs.127.0.0.1:5050.tls.ca_file"},
		{"mirrors:\n  \"*\":\n    endpoint: [https://a.example]\n", "line 3: mirrors has endpoints for \"*\""},
		{"mirrors:\n  ghcr.io:\n    rewrite: {a: b}\n", "line 3: there is a rewrite for ghcr.io"},
		{"mirrors:\n- a\n", "line 2: mirrors.docker.io.endpoint cannot be added here"},
		{"mirrors: &m\n  a: {}\n", "line 1: mirrors.docker.io.endpoint cannot be added here"},
		{"mirrors: null\n", "mirrors.docker.io.endpoint cannot be added"},
		{"mirrors:\n  a: [\n", "this is no YAML"},
		{"a: 1\n---\nb: 2\n", "several documents"},
		{"a: 1\n...\n", "ends the document"},
		{"- a\n", "line 1: this is no mapping"},
		{"a: 1\na: 2\n", "this is no YAML"},
	} {
		if got, err := editRegistriesYAML([]byte(c.old), yamlWants); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q became %v\n%s\nwant it refused with %q", c.old, err, got, c.says)
		}
	}
}

// Whatever registries.yaml is: if it is taken, what comes out can be read, and is
// not changed a second time. That it says the same otherwise, addYAML sees to.
func FuzzRegistriesYAML(f *testing.F) {
	for _, s := range []string{"", "mirrors:\n  a:\n", "{mirrors: {}}", "mirrors: {a: b}\nconfigs:\n  x: |\n    y\n", "mirrors:\r\n  a: 1\r\n", "# x\n\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, old []byte) {
		got, err := editRegistriesYAML(old, yamlWants)
		if err != nil {
			return
		}
		var is any
		if err := yaml.Unmarshal(got, &is); err != nil {
			t.Fatalf("%q became %q: %v", old, got, err)
		}
		if again, err := editRegistriesYAML(got, yamlWants); err != nil || !bytes.Equal(again, got) {
			t.Fatalf("%q became %q and then %q, %v", old, got, again, err)
		}
	})
}
