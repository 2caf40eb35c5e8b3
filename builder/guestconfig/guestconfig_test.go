/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package guestconfig

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/builder/check"
)

// secret is in every place of a configuration that can have one.
const secret = "planted-secret"

// pemFile is a file with an authority, and a key that is nobody's business.
func pemFile(t *testing.T, name string) (certificate, file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return certificate, "# " + secret + "\n" + certificate + string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
}

// node writes the files of a node and reads its configuration; DIR is their
// directory.
func node(t *testing.T, registry string, files, env map[string]string) Node {
	t.Helper()
	dir := t.TempDir()
	for path, text := range files {
		path = filepath.Join(dir, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", dir)), 0o600))
	}
	var c check.RegistryConfig
	require.NoError(t, toml.Unmarshal([]byte(strings.ReplaceAll(registry, "DIR", dir)), &c))
	return Node{Registry: c, Env: env}
}

func makeResult(t *testing.T, n Node, only string) Result {
	t.Helper()
	r, err := Make(t.Context(), n, only)
	require.NoError(t, err)
	return r
}

func registries(r Result) []Registry {
	if r.Image.RegistryConfig == nil {
		return nil
	}
	return r.Image.RegistryConfig.Registries
}

// Each way in which containerd can be told where images are, and what the guest is
// told of it.
func TestMake(t *testing.T) {
	const config = `config_path = "DIR/a:DIR/b"`
	for name, c := range map[string]struct {
		config string
		files  map[string]string
		only   string
		want   []Registry
		notes  []string
	}{
		"nothing": {config: config},
		"a mirror, then the registry": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://m.example\"]\n"},
			want:  []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example"}}}}},
		"mirrors in their order, and a server in place of the registry": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "server = \"https://s.example\"\n[host.\"https://z.example\"]\n[host.\"http://a.example:80\"]\n"},
			want:  []Registry{{Prefix: "r.example", Location: "s.example", Mirrors: []Mirror{{Location: "z.example"}, {Location: "a.example:80", Insecure: true}}}}},
		"a port": {config: config,
			files: map[string]string{"a/r.example_5000_/hosts.toml": "[host.\"https://m.example:7000\"]\n"},
			want:  []Registry{{Prefix: "r.example:5000", Mirrors: []Mirror{{Location: "m.example:7000"}}}}},
		"Docker Hub by its own name": {config: config,
			files: map[string]string{"a/docker.io/hosts.toml": "server = \"https://registry-1.docker.io\"\n[host.\"https://m.example\"]\n"},
			want:  []Registry{{Prefix: "docker.io", Mirrors: []Mirror{{Location: "m.example"}}}}},
		"the registry itself, twice": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "server = \"https://r.example\"\n[host.\"https://r.example\"]\n"}},
		"slashes at the end": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "server = \"https://r.example/\"\n[host.\"https://m.example/\"]\n[host.\"https://n.example/v2/n/\"]\n  override_path = true\n",
				"a/s.example/hosts.toml": "server = \"https://s.example/\"\n"},
			want: []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example"}, {Location: "n.example/n"}}}}},
		"plain HTTP": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "server = \"http://r.example\"\n"},
			want:  []Registry{{Prefix: "r.example", Location: "r.example", Insecure: true}}},
		"plain HTTP with skip_verify, which tries HTTPS first": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "server = \"http://r.example:5000\"\nskip_verify = true\n"},
			want:  []Registry{{Prefix: "r.example", Location: "r.example:5000", Insecure: true}},
			notes: []string{"r.example: containerd does not verify"}},
		"a path with override_path": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://m.example/v2/proxy/r\"]\n  override_path = true\n"},
			want:  []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example/proxy/r"}}}}},
		"a path that a guest cannot be told": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://m.example/r\"]\n[host.\"https://n.example/api\"]\n  override_path = true\n"},
			notes: []string{"r.example: its host m.example has its API at /r/v2", "r.example: its host n.example has its API at /api"}},
		"capabilities": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://p.example\"]\n  capabilities = [\"pull\"]\n[host.\"https://q.example\"]\n  capabilities = [\"push\"]\n[host.\"https://m.example\"]\n  capabilities = [\"pull\", \"resolve\"]\n"},
			want:  []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example"}}}},
			notes: []string{"r.example: its host p.example does not both"}},
		"the mirror only": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "server = \"https://r.example\"\ncapabilities = [\"push\"]\n[host.\"https://m.example\"]\n"},
			want:  []Registry{{Prefix: "r.example", Location: "m.example"}}},
		"nowhere": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "server = \"https://r.example\"\ncapabilities = [\"push\"]\n"},
			want:  []Registry{{Prefix: "r.example", Blocked: true}},
			notes: []string{"r.example: containerd has no host that it could pull from"}},
		"the first directory counts": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://a.example\"]\n", "b/r.example/hosts.toml": "[host.\"https://b.example\"]\n", "b/s.example/hosts.toml": "[host.\"https://b.example\"]\n"},
			want:  []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "a.example"}}}, {Prefix: "s.example", Mirrors: []Mirror{{Location: "b.example"}}}}},
		"one mirror for two": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://m.example\"]\n", "a/x.r.example/hosts.toml": "[host.\"https://m.example\"]\n"},
			want:  []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example"}}}, {Prefix: "x.r.example", Mirrors: []Mirror{{Location: "m.example"}}}},
			notes: []string{"m.example: it is the mirror of r.example and x.r.example"}},
		"one that the entry of another would take": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://m.example\"]\n", "a/x.r.example/hosts.toml": "server = \"https://x.r.example\"\n",
				"a/y.x.r.example/hosts.toml": "[host.\"https://n.example\"]\n", "b/r.example_5000_/.keep": "", "b/q.example/.keep": ""},
			want: []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example"}}}, {Prefix: "x.r.example"},
				{Prefix: "y.x.r.example", Mirrors: []Mirror{{Location: "n.example"}}}, {Prefix: "r.example:5000"}}},
		"all registries": {config: config,
			files: map[string]string{"b/_default/hosts.toml": "[host.\"https://m.example\"]\n"},
			notes: []string{"all registries:"}},
		"one of all registries": {config: config, only: "r.example:5000",
			files: map[string]string{"b/_default/hosts.toml": "server = \"https://m.example\"\n", "a/s.example/hosts.toml": "[host.\"https://x.example\"]\n"},
			want:  []Registry{{Prefix: "r.example:5000", Location: "m.example"}}},
		"one that is not configured": {config: config, only: "r.example"},
		"no TOML": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host"},
			notes: []string{"r.example: containerd cannot read"}},
		"an unknown capability": {config: config,
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://m.example\"]\n  capabilities = [\"dance\"]\n"},
			notes: []string{"r.example: containerd cannot read"}},
		"headers": {config: config + "\nheaders = { X-Meta = [\"" + secret + "\"] }",
			files: map[string]string{"a/r.example/hosts.toml": "[host.\"https://user:" + secret + "@m.example\"]\n  [host.\"https://user:" + secret + "@m.example\".header]\n    X-Key = \"" + secret + "\"\n"},
			want:  []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example"}}}},
			notes: []string{"r.example: containerd sends the header X-Key", "all registries: containerd sends the header X-Meta"}},
		"version 2's mirrors": {config: "mirrors = { \"r.example\" = { endpoint = [\"https://user:" + secret + "@m.example\", \"http://n.example/v2/n\"] }, \"docker.io\" = { endpoint = [\"https://h.example\"] } }",
			want: []Registry{
				{Prefix: "docker.io", Mirrors: []Mirror{{Location: "h.example"}}},
				{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example"}, {Location: "n.example/n", Insecure: true}}}}},
		"version 2's own endpoint": {config: "mirrors = { \"r.example\" = { endpoint = [\"http://r.example\"] } }",
			want: []Registry{{Prefix: "r.example", Location: "r.example", Insecure: true}}},
		"version 2's mirror of all": {config: "mirrors = { \"*\" = { endpoint = [\"m.example\"] } }",
			notes: []string{"all registries:"}},
		"version 2's mirror of all, for one": {config: "mirrors = { \"*\" = { endpoint = [\"m.example\"] } }", only: "r.example",
			want: []Registry{{Prefix: "r.example", Mirrors: []Mirror{{Location: "m.example"}}}}},
		"version 2's credentials": {config: "configs = { \"r.example\" = { auth = { username = \"u\", password = \"" + secret + "\" } } }\nauths = { \"https://s.example\" = { auth = \"" + secret + "\" }, \"user:" + secret + "@t.example\" = {}, \"://" + secret + "\" = {} }\nconfig_path = \"DIR/a\"",
			notes: []string{"a registry: containerd has credentials", "r.example: containerd has credentials", "s.example: containerd has credentials", "t.example: containerd has credentials"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := makeResult(t, node(t, c.config, c.files, nil), c.only)
			assert.Equal(t, c.want, registries(r))
			if assert.Len(t, r.Notes, len(c.notes), "%q", r.Notes) {
				for i, n := range c.notes {
					assert.Contains(t, r.Notes[i], n)
				}
			}
			requireSound(t, r)
		})
	}
}

// requireSound holds that a result is in no format with a secret in it, and that
// what is written is what is read again.
func requireSound(t *testing.T, r Result) {
	t.Helper()
	for _, f := range Formats {
		text, err := r.Encode(f, "https://kbs.example")
		require.NoError(t, err)
		again, err := Parse(text)
		require.NoError(t, err, "%s", text)
		if f != AnnotationValue {
			assert.NotContains(t, string(text), secret)
		}
		want := r.Image
		assert.Equal(t, want, again, f)
		for _, d := range r.Compare(again, "") {
			assert.False(t, d.Elsewhere, d.What)
		}
	}
}

// Authorities are found in all their places, one entry each, and nothing else that
// the files have.
func TestMakeAuthorities(t *testing.T) {
	one, oneFile := pemFile(t, "one")
	two, twoFile := pemFile(t, "two")
	r := makeResult(t, node(t, `config_path = "DIR/a"`, map[string]string{
		"one.pem":                oneFile,
		"both.pem":               oneFile + twoFile,
		"a/r.example/hosts.toml": "ca = \"../../one.pem\"\n[host.\"https://m.example\"]\n  ca = [\"DIR/both.pem\"]\n  client = [[\"DIR/one.pem\", \"DIR/one.pem\"]]\n",
		"a/s.example/x.crt":      twoFile,
		"a/s.example/x.cert":     oneFile,
	}, nil), "")
	assert.ElementsMatch(t, []string{one, two}, r.Image.Certificates)
	assert.True(t, r.Credentials)
	requireSound(t, r)
	text, err := r.Encode(CDH, "")
	require.NoError(t, err)
	assert.Contains(t, string(text), "# authenticated_registry_credentials_uri = \""+Placeholder+"\"")
	assert.NotContains(t, string(text), "PRIVATE")
	r.Image.CredentialsURI = "kbs:///default/credential/here"
	text, err = r.Encode(CDH, "")
	require.NoError(t, err)
	assert.NotContains(t, string(text), Placeholder)
	assert.Contains(t, string(text), "\nauthenticated_registry_credentials_uri = \"kbs:///default/credential/here\"")
	requireSound(t, r)

	_, err = Make(t.Context(), node(t, `config_path = "DIR/a"`, map[string]string{"a/r.example/hosts.toml": "ca = \"gone.pem\"\n"}, nil), "")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "containerd fails with it too")
	for _, bad := range []string{"https://r.example", "r.example/app", "r example", ":5000"} {
		_, err = Make(t.Context(), node(t, "", nil, nil), bad)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, bad)
	}
}

func TestMakeProxy(t *testing.T) {
	for name, c := range map[string]struct {
		env  map[string]string
		want *Proxy
	}{
		"none":            {env: map[string]string{"NO_PROXY": "x"}},
		"both":            {env: map[string]string{"HTTPS_PROXY": "http://p:1", "http_proxy": "q:2", "no_proxy": " a.example , 10.0.0.0/8,,b:80"}, want: &Proxy{HTTPS: "http://p:1", HTTP: "http://q:2", No: "a.example,10.0.0.0/8"}},
		"capitals win":    {env: map[string]string{"HTTPS_PROXY": "https://p", "https_proxy": "https://q"}, want: &Proxy{HTTPS: "https://p"}},
		"credentials":     {env: map[string]string{"HTTPS_PROXY": "http://u:" + secret + "@p:1/?" + secret}, want: &Proxy{HTTPS: "http://p:1"}},
		"of another kind": {env: map[string]string{"HTTPS_PROXY": "socks5://u:" + secret + "@p:1"}},
		"no URL":          {env: map[string]string{"HTTPS_PROXY": "http://%zz" + secret}},
	} {
		t.Run(name, func(t *testing.T) {
			r := makeResult(t, node(t, `config_path = "DIR"`, nil, c.env), "")
			assert.Equal(t, c.want, r.Image.Proxy)
			requireSound(t, r)
		})
	}
}

// A node without any configuration has a guest's that is valid and says nothing.
func TestEncodeEmpty(t *testing.T) {
	r := makeResult(t, node(t, `config_path = "DIR"`, nil, nil), "")
	text, err := r.Encode(CDH, "")
	require.NoError(t, err)
	var t1 map[string]any
	require.NoError(t, toml.Unmarshal(text, &t1))
	assert.Empty(t, t1, "not even [image], which would turn the kernel's parameters off")
	text, err = r.Encode(InitData, "")
	require.NoError(t, err)
	assert.Contains(t, string(text), "[kbc]", "CDH does not start without")
	requireSound(t, r)
	_, err = r.Encode("yaml", "")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	// A name that a comment cannot have.
	r.Notes = []string{"a\nb = '''\x01"}
	requireSound(t, r)
}

func TestCompare(t *testing.T) {
	certificate, file := pemFile(t, "mine")
	other, _ := pemFile(t, "other")
	n := node(t, `config_path = "DIR/a"`, map[string]string{
		"ca.pem":                 file,
		"a/r.example/hosts.toml": "ca = \"DIR/ca.pem\"\n[host.\"https://m.example\"]\n",
	}, map[string]string{"HTTPS_PROXY": "http://p.example:1", "NO_PROXY": "a,b"})
	r := makeResult(t, n, "")
	text, err := r.Encode(CDH, "")
	require.NoError(t, err)
	same := string(text)
	for name, c := range map[string]struct {
		text, only string
		elsewhere  bool
		says       string
	}{
		"the same":                   {text: same},
		"said in another way":        {text: strings.Replace(strings.Replace(same, "a,b", "b, a", 1), "prefix = 'r.example'", "location = 'r.example'", 1)},
		"nothing":                    {elsewhere: true, says: "r.example: the node pulls from m.example by HTTPS, then r.example by HTTPS, the guest from r.example by HTTPS"},
		"another mirror":             {text: strings.ReplaceAll(same, "m.example", "n.example"), elsewhere: true, says: "n.example by HTTPS"},
		"one more registry":          {text: same + "\n[[image.registry_config.registry]]\nprefix = 'x.example/deep'\nblocked = true\n", elsewhere: true, says: "x.example/deep: the node pulls from x.example/deep by HTTPS, the guest from nowhere"},
		"more, but not of this one":  {text: same + "\n[[image.registry_config.registry]]\nprefix = 'x.example/deep'\nblocked = true\n", only: "r.example"},
		"a rule that matches inside": {text: same + "\n[[image.registry_config.registry]]\nprefix = 'example'\nlocation = 'y.z'\n", elsewhere: true, says: "the guest from y.z by HTTPS"},
		"short names":                {text: strings.Replace(same, "[image.registry_config]", "[image.registry_config]\nunqualified-search-registries = ['docker.io', 'q.example']", 1), elsewhere: true, says: "docker.io: the node pulls from docker.io by HTTPS, the guest from docker.io by HTTPS, then q.example by HTTPS"},
		"no authority":               {text: strings.Replace(same, certificate, other, 1), elsewhere: true, says: `authority "CN=mine"`},
		"one more authority":         {text: strings.Replace(same, certificate, certificate+"\"\"\", \"\"\""+other, 1), says: `authority "CN=other"`},
		"another proxy":              {text: strings.Replace(same, "p.example", "u:"+secret+"@q.example", 1), elsewhere: true, says: "q.example"},
		"the same proxy":             {text: strings.Replace(same, "http://p.example:1", "http://p.example:1/", 1)},
		"one that a rule catches":    {text: same, only: "x.r.example", elsewhere: true, says: "x.r.example: the node pulls from x.r.example by HTTPS, the guest from m.example by HTTPS, then x.r.example by HTTPS"},
		"fewer exceptions":           {text: strings.Replace(same, "a,b", "a", 1), elsewhere: true, says: "no_proxy"},
		"elsewhere":                  {text: "[image]\nregistry_configuration_uri = 'kbs:///a/b/c'\n", elsewhere: true, says: "kbs:///a/b/c, which cannot be compared"},
	} {
		t.Run(name, func(t *testing.T) {
			guest, err := Parse([]byte(c.text))
			require.NoError(t, err)
			elsewhere, said := false, ""
			for _, d := range makeResult(t, n, c.only).Compare(guest, c.only) {
				elsewhere = elsewhere || d.Elsewhere
				said += d.What + "\n"
			}
			assert.Equal(t, c.elsewhere, elsewhere, said)
			assert.Contains(t, said, c.says)
			assert.NotContains(t, said, secret)
			if c.says == "" {
				assert.Empty(t, said)
			}
		})
	}
	for _, bad := range []string{"[image", "AAAA", "[data]\n\"cdh.toml\" = \"[\"\n"} {
		_, err := Parse([]byte(bad))
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, bad)
	}
}
