package config_test

import (
	"slices"
	"strings"
	"testing"

	"tidemark/config"
)

// A well-known upstream keeps what is known of it when its entry only adds
// something, such as credentials.
func TestWellKnownUpstreamKeepsWhatIsKnownOfIt(t *testing.T) {
	t.Setenv("PW", "hunter2")
	for _, file := range []string{
		"upstreams: {docker.io: {username: u, password: '${PW}'}}",
		"upstreams:\n  docker.io:\n",
		"upstreams: {docker.io: {shared: true}}",
	} {
		u := mustParse(t, file).Upstreams["docker.io"]
		if !slices.Equal(u.Endpoints, []string{"https://registry-1.docker.io"}) || !slices.Equal(u.TokenRealms, []string{"auth.docker.io"}) || len(u.Hosts) != 2 {
			t.Errorf("%q: docker.io is %+v", file, u)
		}
	}
	u := mustParse(t, "upstreams: {docker.io: {endpoints: ['https://hub.example'], hosts: [], token_realms: []}}").Upstreams["docker.io"]
	if !slices.Equal(u.Endpoints, []string{"https://hub.example"}) || len(u.TokenRealms)+len(u.Hosts) != 0 {
		t.Errorf("what the entry says is overruled: %+v", u)
	}
}

// Whatever a secret is written as in the wrong place, no error shows it, also
// not an error about the line beside it.
func TestSecretsInTheWrongPlaceAreNotShown(t *testing.T) {
	for _, entry := range []string{
		"password: hunter2", "password : hunter2", "Password: hunter2", "passwrod: hunter2", "\"password\": hunter2",
		"password:\n      hunter2", "password: |\n      hunter2", "password:\n      - hunter2", "pwd: hunter2",
		"endpoints: ['https://user:hunter2@h']", "endpoints: ['https://user:hun/hunter2@h']", "endpoints: ['https://u:x@hunter2@h']",
		"endpoints: ['user:hunter2@h']", "endpoints: [https://user:hunter2@h, 3]", "token: hunter2", "password: {a: hunter2}",
		"password: &x hunter2", "password: [hunter2", "password: 'hunter2",
	} {
		for _, beside := range []string{"", "    foo: 1\n", "    insecure: perhaps\n", "    }\n"} {
			file := "default_upstream: h\nupstreams:\n  h:\n    " + entry + "\n" + beside
			_, err := config.Parse([]byte(file), nil, nil)
			if err == nil {
				t.Errorf("%q is accepted", file)
			} else if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%q: the error shows the secret:\n%v", file, err)
			}
		}
	}
}

// What YAML can do beside keys and values is refused, not misread.
func TestYAMLsOtherPunctuationIsRefused(t *testing.T) {
	for _, file := range []string{"data: &a x", "data: *a", "data: !!str x", "---\n---\ndata: y\n"} {
		if _, err := config.Parse([]byte(file), nil, nil); err == nil {
			t.Errorf("%q is accepted", file)
		}
	}
	if c := mustParse(t, "\ufeffdata: x"); c.Data != "x" {
		t.Errorf("with a byte order mark data is %q", c.Data)
	}
}

// A key that stands twice, an unknown one and wrong values are told together;
// what follows from a value that did not decode is not.
func TestErrorsAboutKeysAndValuesAreToldTogether(t *testing.T) {
	for _, tt := range []struct {
		file string
		want []string // paths
	}{
		{"data: a\ndata: b\nfoo: 1\n", []string{"data", "foo"}},
		{"tags: {ttl: x, refresh: y}", []string{"tags.ttl", "tags.refresh"}},
		{"upstreams: 3", []string{"upstreams"}},
		{"upstreams:\n  docker.io: {}\n  docker.io: {}\n", []string{"upstreams[docker.io]"}},
		{"registry: {listen: 127.0.0.1:99999}", []string{"registry.listen"}},
		{"upstreams: {docker.io: {endpoints: ['https://a:99999']}}", []string{"upstreams[docker.io].endpoints[0]"}},
	} {
		var got []string
		for _, e := range refused(t, tt.file) {
			got = append(got, e.Path)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%q: errors about %v, want %v", tt.file, got, tt.want)
		}
	}
}
