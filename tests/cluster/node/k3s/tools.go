package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// imageList names the images that were imported into the node: their names, not their content.
const imageList = "/var/lib/rancher/k3s/agent/images.json"

func images() ([]string, error) {
	var names []string
	content, err := os.ReadFile(imageList)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return names, json.Unmarshal(content, &names)
}

func keepImages(names []string) error {
	content, err := json.Marshal(names)
	if err != nil {
		return err
	}
	return write(imageList, string(content), 0o644)
}

// crictl knows `images`, `images --output=json`, `ps --all --output=json` (a container of each image
// that a pod of the cluster names) and `rmi --prune`, which forgets the images that no pod uses.
func crictl(arguments []string) error {
	names, err := images()
	if err != nil {
		return err
	}
	switch strings.Join(arguments, " ") {
	case "images", "image ls":
		for _, name := range names {
			fmt.Println(name)
		}
		return nil
	case "images --output=json":
		shown := []map[string]any{}
		for _, name := range names {
			shown = append(shown, map[string]any{"id": imageID(name), "repoTags": []string{name}, "size": "1048576"})
		}
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"images": shown})
	case "ps --all --output=json":
		used, err := imagesOfPods()
		if err != nil {
			return err
		}
		shown := []map[string]any{}
		for name := range used {
			shown = append(shown, map[string]any{"imageRef": imageID(name), "image": map[string]any{"image": name}})
		}
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"containers": shown})
	case "rmi --prune":
		used, err := imagesOfPods()
		if err != nil {
			return err
		}
		var kept []string
		for _, name := range names {
			if used[name] {
				kept = append(kept, name)
			} else {
				fmt.Println("Deleted:", name)
			}
		}
		return keepImages(kept)
	}
	return fmt.Errorf("the stand-in's crictl does not know %q", arguments)
}

func imageID(name string) string {
	return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(name)))
}

// imagesOfPods are the names of the images that a pod of the cluster uses.
func imagesOfPods() (map[string]bool, error) {
	client, err := clientOf(kubeconfig)
	if err != nil {
		return nil, err
	}
	pods, err := client.CoreV1().Pods("").List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, pod := range pods.Items {
		for _, container := range append(pod.Spec.Containers, pod.Spec.InitContainers...) {
			used[container.Image] = true
		}
	}
	return used, nil
}

// ctr knows `image import [--all-platforms] FILE|-` and `image ls -q`.
func ctr(arguments []string) error {
	arguments = slices.DeleteFunc(slices.Clone(arguments), func(word string) bool {
		return word == "--all-platforms" || word == "-n" || word == "--namespace" || word == "k8s.io"
	})
	names, err := images()
	if err != nil {
		return err
	}
	if len(arguments) < 2 || (arguments[0] != "image" && arguments[0] != "images" && arguments[0] != "i") {
		return fmt.Errorf("the stand-in's ctr does not know %q", arguments)
	}
	switch {
	case slices.Equal(arguments[1:], []string{"ls", "-q"}), slices.Equal(arguments[1:], []string{"list", "-q"}):
		for _, name := range names {
			fmt.Println(name)
		}
		return nil
	case arguments[1] == "import" && len(arguments) == 3:
		source := os.Stdin
		if arguments[2] != "-" {
			if source, err = os.Open(arguments[2]); err != nil {
				return err
			}
			defer source.Close()
		}
		found, err := namesInArchive(source)
		if err != nil {
			return err
		}
		for _, name := range found {
			fmt.Printf("unpacking %s...done\n", name)
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
		return keepImages(names)
	}
	return fmt.Errorf("the stand-in's ctr does not know %q", arguments)
}

// namesInArchive reads the image names of an archive as `docker save` writes it.
func namesInArchive(source io.Reader) ([]string, error) {
	archive := tar.NewReader(source)
	var names []string
	found := false
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if header.Name == "manifest.json" {
			var entries []struct{ RepoTags []string }
			if err := json.NewDecoder(archive).Decode(&entries); err != nil {
				return nil, err
			}
			found = true
			for _, entry := range entries {
				for _, tag := range entry.RepoTags {
					names = append(names, canonical(tag))
				}
			}
		}
	}
	if !found {
		return nil, errors.New("ctr: unrecognized image format")
	}
	return names, nil
}

// canonical is an image's name as containerd keeps it.
func canonical(name string) string {
	first, _, slash := strings.Cut(name, "/")
	switch {
	case !slash:
		return "docker.io/library/" + name
	case strings.ContainsAny(first, ".:") || first == "localhost":
		return name
	}
	return "docker.io/" + name
}

// runProxy is k3d's load balancer: it passes connections on to the servers that the file names.
func runProxy(ctx context.Context, file string) error {
	var written time.Time
	var listeners []net.Listener
	for ; ; pause(ctx, time.Second) {
		if ctx.Err() != nil {
			return nil
		}
		seen, err := os.Stat(file)
		if err != nil || seen.ModTime().Equal(written) {
			continue
		}
		written = seen.ModTime()
		var config struct{ Ports map[string][]string }
		if err := yaml.Unmarshal(mustRead(file), &config); err != nil {
			return err
		}
		for _, one := range listeners {
			one.Close()
		}
		listeners = nil
		for port, servers := range config.Ports {
			number, protocol, _ := strings.Cut(port, ".")
			if protocol != "tcp" {
				continue
			}
			listener, err := net.Listen("tcp", ":"+number)
			if err != nil {
				return err
			}
			listeners = append(listeners, listener)
			go balance(listener, number, servers)
		}
		// k3d waits for this line of nginx.
		fmt.Fprintln(os.Stderr, "start worker processes")
	}
}

func balance(listener net.Listener, port string, servers []string) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer client.Close()
			for _, name := range servers {
				server, err := net.DialTimeout("tcp", net.JoinHostPort(name, port), 2*time.Second)
				if err != nil {
					continue
				}
				defer server.Close()
				go func() {
					io.Copy(server, client)
					server.Close()
				}()
				io.Copy(client, server)
				return
			}
		}()
	}
}
