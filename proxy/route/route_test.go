package route_test

import (
	"errors"
	"strings"
	"testing"

	"tidemark/proxy/route"
)

func table(t *testing.T, fallback string) *route.Table {
	t.Helper()
	table, err := route.NewTable(fallback, []route.Upstream{
		{Name: "docker.io", Hosts: []string{"Hub.Example", "hub.example:8443"}},
		{Name: "ghcr.io"},
		{Name: "localhost:5000"},
		{Name: "internal"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// absent says that a request has no ns parameter.
const absent = "(absent)"

// A request means the upstream of its ns, else that of its Host, else that of
// its first component, else the default one; docker.io's official images may
// leave out library/.
func TestUpstreamIsChosenInOrder(t *testing.T) {
	for _, tt := range []struct {
		name           string
		host, ns, repo string // the request
		upstream, asks string // and what upstream is asked for
	}{
		{"the default", "mirror:5050", absent, "org/app", "docker.io", "org/app"},
		{"the default, official image", "mirror:5050", absent, "nginx", "docker.io", "library/nginx"},
		{"the default, official image in full", "mirror:5050", absent, "library/nginx", "docker.io", "library/nginx"},
		{"no host", "", absent, "nginx", "docker.io", "library/nginx"},
		{"an address for a host", "[::1]:5050", absent, "nginx", "docker.io", "library/nginx"},

		{"first component", "mirror", absent, "ghcr.io/org/app", "ghcr.io", "org/app"},
		{"first component, one more", "mirror", absent, "ghcr.io/app", "ghcr.io", "app"},
		{"first component, docker.io", "mirror", absent, "docker.io/nginx", "docker.io", "library/nginx"},
		{"first component, docker.io in full", "mirror", absent, "docker.io/library/nginx", "docker.io", "library/nginx"},
		{"first component without a dot", "mirror", absent, "internal/app", "internal", "app"},
		{"only the first component", "mirror", absent, "org/ghcr.io/app", "docker.io", "org/ghcr.io/app"},
		{"an upstream's name in another's", "mirror", absent, "ghcr.io/docker.io/app", "ghcr.io", "docker.io/app"},

		{"Host", "ghcr.io", absent, "org/app", "ghcr.io", "org/app"},
		{"Host, one component", "ghcr.io", absent, "app", "ghcr.io", "app"},
		{"Host in upper case", "GHCR.IO", absent, "org/app", "ghcr.io", "org/app"},
		{"Host with a port", "ghcr.io:443", absent, "org/app", "ghcr.io", "org/app"},
		{"Host that is a name with a port", "LocalHost:5000", absent, "org/app", "localhost:5000", "org/app"},
		{"Host that has another port than the name", "localhost:5050", absent, "nginx", "docker.io", "library/nginx"},
		{"Host from hosts", "hub.example", absent, "nginx", "docker.io", "library/nginx"},
		{"Host from hosts with its port", "hub.example:8443", absent, "nginx", "docker.io", "library/nginx"},
		{"Host before first component", "ghcr.io", absent, "docker.io/library/nginx", "ghcr.io", "docker.io/library/nginx"},

		{"ns", "mirror", "ghcr.io", "org/app", "ghcr.io", "org/app"},
		{"ns of docker.io", "mirror", "docker.io", "nginx", "docker.io", "library/nginx"},
		{"ns in upper case", "mirror", "GHCR.io", "org/app", "ghcr.io", "org/app"},
		{"ns with a port", "mirror", "localhost:5000", "app", "localhost:5000", "app"},
		{"ns from hosts", "mirror", "hub.example", "nginx", "docker.io", "library/nginx"},
		{"ns before Host", "docker.io", "ghcr.io", "org/app", "ghcr.io", "org/app"},
		{"ns before first component", "mirror", "ghcr.io", "docker.io/library/nginx", "ghcr.io", "docker.io/library/nginx"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ns, hasNS := tt.ns, tt.ns != absent
			if !hasNS {
				ns = ""
			}
			got, err := table(t, "docker.io").Route(tt.host, ns, hasNS, tt.repo)
			want := route.Target{Upstream: tt.upstream, Repository: tt.asks, Name: tt.repo}
			if err != nil || got != want {
				t.Errorf("%s from Host %s, ns %s means %+v, %v; want %+v", tt.repo, tt.host, tt.ns, got, err, want)
			}
		})
	}
}

// library/ is the Hub's, not the default upstream's.
func TestOfficialImagesAreOfTheHubAlone(t *testing.T) {
	tab := table(t, "ghcr.io")
	for _, tt := range []struct{ repo, upstream, asks string }{
		{"app", "ghcr.io", "app"},
		{"docker.io/nginx", "docker.io", "library/nginx"},
		{"acme.example/app", "ghcr.io", "acme.example/app"}, // elsewhere a namespace may have a dot
	} {
		got, err := tab.Route("mirror", "", false, tt.repo)
		want := route.Target{Upstream: tt.upstream, Repository: tt.asks, Name: tt.repo}
		if err != nil || got != want {
			t.Errorf("%s means %+v, %v; want %+v", tt.repo, got, err, want)
		}
	}
}

// A name that is not in the configuration is refused, with what the operator
// can do about it. It never becomes an address, whatever it looks like.
func TestWhatIsNotConfiguredIsRefused(t *testing.T) {
	for _, tt := range []struct {
		host, ns, repo string
		name           string // that the error is about
	}{
		{"mirror", "quay.io", "org/app", "quay.io"},
		{"mirror", "", "org/app", ""},
		{"ghcr.io", "", "org/app", ""},
		{"ghcr.io", "quay.io", "ghcr.io/app", "quay.io"},
		{"mirror", "internal.", "app", "internal."},
		{"mirror", "169.254.169.254", "latest/meta-data", "169.254.169.254"},
		{"mirror", "localhost:5001", "app", "localhost:5001"},
		{"mirror", "https://ghcr.io", "app", "https://ghcr.io"},
		{"mirror", "ghcr.io@evil.example", "app", "ghcr.io@evil.example"},
		{"mirror", "ghcr.io/org", "app", "ghcr.io/org"},
		{"mirror", " ghcr.io", "app", " ghcr.io"},
		{"mirror", "*", "app", "*"},
		{"mirror", absent, "quay.io/org/app", "quay.io"},
		{"quay.io", absent, "quay.io/org/app", "quay.io"},
		{"mirror", absent, "127.0.0.1/app", "127.0.0.1"},
		{"mirror", absent, "hub.example/nginx", "hub.example"}, // a Host, not a name
	} {
		ns, hasNS := tt.ns, tt.ns != absent
		if !hasNS {
			ns = ""
		}
		got, err := table(t, "docker.io").Route(tt.host, ns, hasNS, tt.repo)
		var unknown *route.ErrUnknown
		if !errors.As(err, &unknown) || unknown.Name != tt.name || got != (route.Target{}) {
			t.Errorf("%s from Host %s, ns %q means %+v, %v; want it refused for %q", tt.repo, tt.host, tt.ns, got, err, tt.name)
			continue
		}
		for _, want := range []string{`"` + tt.name + `"`, "upstreams", "configuration"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v; want a word about %s", err, want)
			}
		}
	}
	_, err := table(t, "docker.io").Route("mirror", strings.Repeat("x", 100_000), true, "app")
	if err == nil || len(err.Error()) > 1000 {
		t.Errorf("a long ns is refused in %d bytes, want a few", len(err.Error()))
	}
}

// A table that would not know what a request means is not made.
func TestTableThatIsAmbiguousIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name      string
		fallback  string
		upstreams []route.Upstream
		says      string
	}{
		{"a host of two upstreams", "a", []route.Upstream{{Name: "a", Hosts: []string{"Hub"}}, {Name: "b", Hosts: []string{"hub"}}}, "hub"},
		{"a host that is another's name", "a", []route.Upstream{{Name: "a", Hosts: []string{"b"}}, {Name: "b"}}, "b"},
		{"a default that is not there", "c", []route.Upstream{{Name: "a"}}, "c"},
		{"nothing", "", nil, "default"},
	} {
		if _, err := route.NewTable(tt.fallback, tt.upstreams); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v; want a refusal that names %q", tt.name, err, tt.says)
		}
	}
	if _, err := route.NewTable("a", []route.Upstream{{Name: "a", Hosts: []string{"a", "h", "H"}}}); err != nil {
		t.Errorf("a host that is said twice for one upstream: %v", err)
	}
}
